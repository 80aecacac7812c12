"""A whole evaluation: a pack, what it is compared with, and the bytes of each, in one result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from d3pack import __version__
from d3pack.decode import local_backbone
from d3pack.errors import SourceError, UsageError
from d3pack.evaluate.baselines import BASELINES, JPEG_FILES, Baseline, pack_entries, sent_bytes
from d3pack.evaluate.bench import Bench, EntryResult
from d3pack.evaluate.entries import Entry, PayloadFormat, PayloadSettings
from d3pack.evaluate.payload import candidates, file_bytes, pilots_of
from d3pack.evaluate.settings import EvalSettings
from d3pack.evaluate.sweep import learner, parse_sweep, run_sweep, sweep_entry, variants
from d3pack.evaluate.teacher import open_teacher
from d3pack.evaluate.turns import only_process, turn
from d3pack.format import Pack
from d3pack.hub import load_named
from d3pack.sources import Source, open_source
from d3pack.students import (
    DD_RANKING,
    PILOT_SHARE,
    PROTOCOLS,
    RANKED,
    LabelledImages,
    Protocol,
    RealImages,
    common_size,
)
from d3pack.system import (
    Events,
    Listener,
    ObjectPath,
    Shard,
    SharedFolder,
    Workers,
    count,
    duration,
    fast_bfloat16,
    place,
    resolve_device,
    run_work,
    write_json,
)

LONG = 3600.0  # seconds: what takes longer needs `allow_long`
_Real = str | Path | Source | Mapping[str, Any] | None  # the last: arguments of `open_source`
_SPLITS = ("test", "val", "dev")  # names of the part to test on
_SHOWN = 8  # images of each class in the report
_WEIGHT = 0.5  # of both parts of the label-robust score


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The bytes of a pack, beside those of real images."""

    pack: int  # the file
    sections: Mapping[str, int]
    labels: int
    adapter: int
    teacher: int | None
    backbone: int
    marginal: int  # for somebody who has the backbone
    sent: int  # the file, and its backbone where it cannot be had elsewhere
    everything: int  # for somebody who has nothing: file, backbone and teacher
    jpeg: float  # mean bytes of one real image as a JPEG file of quality 75
    break_even_marginal: int  # JPEG files that weigh as much as the pack
    break_even_everything: int

    @classmethod
    def of(cls, pack: Pack, jpeg: float) -> LedgerView:
        """Return the ledger of a pack beside real images of `jpeg` bytes each."""
        ledger = pack.ledger()
        return cls(
            pack=ledger.total,
            sections=dict(ledger.sections),
            labels=ledger.sections.get("labels", 0),
            adapter=ledger.sections.get("adapter", 0),
            teacher=ledger.teacher,
            backbone=ledger.backbone,
            marginal=ledger.total,
            sent=sent_bytes(pack),
            everything=ledger.everything,
            jpeg=jpeg,
            break_even_marginal=math.ceil(ledger.total / jpeg),
            break_even_everything=math.ceil(ledger.everything / jpeg),
        )


def label_robust_score(recovery: float, improvement: float, weight: float = _WEIGHT) -> float:
    """Return DD-Ranking's LRS of HLR and IOR as shares of 1; larger is better, 1 is the most.

    HLR, the recovery, is what hard labels lose against the whole real set; IOR, the improvement,
    is the gain over as many random real images (NUS-HPC-AI-Lab/DD-Ranking).
    """
    alpha = weight * improvement - (1 - weight) * recovery
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        name: name of the pack's file.
        work: the work directory; it holds `evaluation.json`.
        pack: the pack.
        protocol: how students were trained and tested.
        results: an entry each; the pack is the first.
        ledger: the bytes of the pack.
        decode_seconds: how long this machine took to decode it.
        facts: what was the same for all entries: student, size, seeds, updates, ...
        images: a few images of each class, (C, n, 3, s, s), by title; for the report.
        sweep: variants of the pack, where a sweep was asked for.
    """

    name: str
    work: Path | ObjectPath
    pack: Pack
    protocol: Protocol
    results: tuple[EntryResult, ...]
    ledger: LedgerView
    decode_seconds: float
    facts: Mapping[str, Any]
    images: Mapping[str, Tensor]
    sweep: tuple[Mapping[str, Any], ...] = field(default=())

    def get(self, key: str) -> EntryResult | None:
        """Return the result of an entry, by the first word of its key: pack, webp, names, ..."""
        return next((r for r in self.results if r.entry.key.split("-")[0] == key), None)

    def scores(self) -> dict[str, float]:
        """Return DD-Ranking's IOR, HLR and LRS, means over runs; none unless all of it is followed.

        That is: its protocol unchanged, on a set that it has schedules for, five runs of the pack
        with hard labels, of random images and of the whole set, the best test of each. Other
        protocols and labels give other figures, which bear no comparison with published scores.
        """
        size = int(self.facts["size"])
        classes = len(self.pack.classes)
        pack, random, whole = self.get("pack"), self.get("random"), self.get("whole")
        if (
            self.protocol != DD_RANKING.settled(classes, size=size)
            or (classes, size) not in RANKED
            or pack is None
            or random is None
            or whole is None
            or self.facts["seeds"] < DD_RANKING.seeds
        ):
            return {}
        runs = zip(pack.histories, random.histories, whole.histories, strict=True)
        terms = [(p.best - r.best, w.best - p.best) for p, r, w in runs]
        improvements, recoveries = zip(*terms, strict=True)
        robust = [label_robust_score(recovery, gain) for gain, recovery in terms]
        return {"IOR": fmean(improvements), "HLR": fmean(recoveries), "LRS": fmean(robust)}

    def to_json(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        return {
            "d3pack": __version__,
            "pack": {
                "root": self.pack.root,
                "classes": list(self.pack.classes),
                "images_per_class": self.pack.images_per_class,
                "recipe": self.pack.recipe.to_json(),
            },
            "protocol": json.loads(json.dumps(asdict(self.protocol))),
            "facts": dict(self.facts),
            "ledger": asdict(self.ledger),
            "decode_seconds": self.decode_seconds,
            "scores": self.scores(),
            "entries": [result.to_json() for result in self.results],
            "sweep": [dict(point) for point in self.sweep],
        }


def evaluate(
    pack: str | Path | Pack,
    real: str | Path | Source,
    settings: EvalSettings | None = None,
    *,
    test: str | Path | Source | None = None,
    work: str | Path | ObjectPath | None = None,
    class_names: str | Path | Mapping[str, str] | None = None,
    protocol: Protocol | None = None,
    listeners: Sequence[Listener] = (),
    workers: Workers | None = None,
) -> Evaluation:
    """Train students on a pack and on real images of equal bytes, and compare them.

    Finished students are kept in the work directory: after an interruption the same call goes on,
    and another baseline trains its own students only. All figures are written to `evaluation.json`
    there; `write_report` makes a page of them.

    Args:
        pack: a `.d3m` file, an `hf://` or `s3://` address or a pack.
        real: real images with a train and a test part (also called val or dev): a folder, archive,
            or whatever else `open_source` reads; or the training images, as a source.
        settings: what to compare, and how; None for the defaults.
        test: real test images, where `real` does not have them.
        work: directory of finished students, or an address such as `s3://bucket/x.eval`; None: the
            name of the pack with `.eval`, in the current directory.
        class_names: table from folder names to class names, or its file.
        protocol: a protocol of your own, in place of the one that the settings name.
        listeners: receive the events of the run.
        workers: train in shards, on several devices or machines that share the work directory.

    Returns:
        The accuracy of every entry, with its bytes.

    Raises:
        UsageError: if settings contradict each other, the test images are the training images, or
            the students would take hours and `allow_long` is not set (code `E_LONG`).
        SourceError: if the real images cannot be used, or have other classes (code `E_CLASSES`).
        InvalidPackError: if the file is not a valid pack.
        BackboneError: if the pack cannot be decoded.

    Example:
        >>> from d3pack.evaluate import EvalSettings, evaluate, write_report
        >>> settings = EvalSettings(baselines=("webp", "names"), seeds=1)
        >>> evaluation = evaluate("cifar10.d3m", "cifar10/", settings)  # doctest: +SKIP
        >>> evaluation.get("pack").last.mean  # doctest: +SKIP
        0.431
        >>> write_report(evaluation, "report.html")  # doctest: +SKIP
    """
    run = _Run(pack, real, settings or EvalSettings(), test, work, class_names, protocol)
    if workers is not None and workers.wanted:
        evaluation: Evaluation = run_work(
            run.sent(), workers, listeners, device=run.settings.device
        )
    else:
        run.listeners = listeners
        evaluation = run.compare()
    write_json(evaluation.work / "evaluation.json", evaluation.to_json())
    return evaluation


def evaluate_shard(
    pack: str | Path | Pack,
    real: str | Path | Source,
    shard: Shard,
    settings: EvalSettings | None = None,
    *,
    test: str | Path | Source | None = None,
    work: str | Path | ObjectPath | None = None,
    class_names: str | Path | Mapping[str, str] | None = None,
    protocol: Protocol | None = None,
    listeners: Sequence[Listener] = (),
) -> int:
    """Train the students of one share of an evaluation, and keep them in the work directory.

    Students are counted in the order of the evaluation: seed after seed, entry after entry. Any
    number of shards may work in one directory at the same time, on one machine or on many that
    share it. What several of them need is made by the first and awaited by the others: a teacher
    that is trained, each format's pilots, packs that a sweep learns. Each decodes the packs that
    its students need. When all are done, `evaluate` finds all students and puts them side by side.

    Args:
        pack: as for `evaluate`, like all others here.
        real: real images.
        shard: which share to train.
        settings: what to compare, and how; the same for all shards.
        test: real test images.
        work: directory of finished students, which all shards share.
        class_names: table from folder names to class names.
        protocol: a protocol of your own.
        listeners: receive the events of the run.

    Returns:
        The number of students that were trained now; the others of the share were there.

    Raises:
        UsageError: if another process trains the same shard, or as `evaluate` does.
        SourceError: if the real images cannot be used, or have other classes (code `E_CLASSES`).
        InvalidPackError: if the file is not a valid pack.
        BackboneError: if the pack cannot be decoded.
    """
    run = _Run(pack, real, settings or EvalSettings(), test, work, class_names, protocol)
    run.listeners = listeners
    return run.train(shard)


@dataclass
class _Run:
    """An evaluation; workers open it once, for all their shards."""

    pack: str | Path | Pack
    real: _Real
    settings: EvalSettings
    test: _Real
    work: str | Path | ObjectPath | None
    class_names: str | Path | Mapping[str, str] | None
    protocol: Protocol | None
    listeners: Sequence[Listener] = ()

    def __post_init__(self) -> None:
        self.axes = parse_sweep(self.settings.sweep)
        self.name, self.opened, self.settings = _open_pack(self.pack, self.settings)
        self.kept = SharedFolder(place(self.work or f"{Path(self.name).stem}.eval"))

    @property
    def folder(self) -> Path | None:
        """What workers have to see."""
        return self.kept.where if isinstance(self.kept.where, Path) else None

    @cached_property
    def plan(self) -> _Plan:
        """What students are trained on, and how."""
        real, test = _reopened(self.real), _reopened(self.test)
        assert real is not None
        bench, protocol = _open_bench(
            self.opened,
            real,
            self.settings,
            test,
            self.kept,
            self.class_names,
            self.protocol,
            self.listeners,
        )
        return _Plan(self.opened, bench, protocol, self.settings, self.axes)

    def train(self, shard: Shard) -> int:
        """Train the students of a share; return how many were missing."""
        with self.kept.opened(), only_process(self.kept, shard):
            plan, bench = self.plan, self.plan.bench
            entries = plan.entries(shard)
            before = bench.trained
            for row, seed in plan.students(shard):
                entry = entries[row]
                if entry is not None:
                    bench.student(entry, seed)
            if shard.owns(0):
                bench.decode_seconds(self.opened)
            return bench.trained - before

    def compare(self) -> Evaluation:
        """Train the students that are missing, and put everything side by side."""
        with self.kept.opened():
            return _compare(self.name, self.plan)

    def sent(self) -> _Run:
        """What workers get: they open the real images themselves."""
        return replace(self, pack=self.opened, real=_address(self.real), test=_address(self.test))

    def open(self, listen: Listener) -> None:
        """Open the pack, the real images and the teacher."""
        self.listeners = [listen]
        with self.kept.opened():
            assert self.plan

    def do(self, shard: Shard) -> None:
        """Train the students of a share."""
        self.train(shard)

    def finish(self, count: int) -> Evaluation:
        """Compare; what built the training sets stays here."""
        evaluation = self.compare()
        results = [
            replace(result, entry=replace(result.entry, build=_built))
            for result in evaluation.results
        ]
        return replace(evaluation, results=tuple(results))


def _built(seed: int) -> LabelledImages:
    raise UsageError("a worker has built this training set", hint="evaluate without workers")


def _reopened(source: _Real) -> str | Path | Source | None:
    return open_source(**source) if isinstance(source, Mapping) else source


def _address(source: _Real) -> _Real:
    """What opens a source on another machine."""
    return source.address() if isinstance(source, Source) else source


def _open_bench(
    pack: Pack,
    real: str | Path | Source,
    settings: EvalSettings,
    test: str | Path | Source | None,
    work: SharedFolder,
    class_names: str | Path | Mapping[str, str] | None,
    protocol: Protocol | None,
    listeners: Sequence[Listener],
) -> tuple[Bench, Protocol]:
    """The bench of an evaluation, and its protocol as it is published for the pack."""
    published = protocol or PROTOCOLS[settings.protocol]
    train_source, test_source = _open_real(real, test, class_names)
    protocol = published.settled(len(pack.classes), student=settings.student)
    size = choose_size(protocol, settings.size, test_source)
    protocol = published.settled(len(pack.classes), student=settings.student, size=size)
    train = RealImages(train_source, pack.classes, size, "training", protocol.resample)
    # resized once, from the original to the side that the centre is cropped from
    side = protocol.test_side(size)
    test_images = RealImages(test_source, pack.classes, side, "test", protocol.resample)
    events = Events(list(listeners))
    teacher = None
    if settings.teacher is not None:
        device = resolve_device(settings.device)
        teacher = open_teacher(settings.teacher, train, work, device, events)
    bench = Bench(
        train,
        test_images,
        len(pack),
        protocol,
        work,
        device=settings.device,
        backbone=settings.backbone,
        teacher=teacher,
        events=events,
    )
    return bench, protocol


def _open_pack(pack: str | Path | Pack, settings: EvalSettings) -> tuple[str, Pack, EvalSettings]:
    """Name, pack, and settings that name the backbone beside its file."""
    if isinstance(pack, Pack):
        return pack.root[:12], pack, settings
    name, opened = load_named(pack)
    folder = None if settings.backbone else local_backbone(pack, opened)
    if folder is not None:
        settings = replace(settings, backbone=str(folder))
    return name, opened, settings


def _open_real(
    real: str | Path | Source,
    test: str | Path | Source | None,
    class_names: str | Path | Mapping[str, str] | None,
) -> tuple[Source, Source]:
    """The training images and the test images, which must not be the same."""
    if isinstance(real, Source) and test is None:
        raise UsageError("missing test images: expected test=, as real is a source")
    if isinstance(real, Source):
        training = real
    else:
        training = open_source(real, class_names=class_names, split="train")
    testing = test if test is not None else real
    if not isinstance(testing, Source):
        testing = _open_test(testing, class_names)
    if training.fingerprint() == testing.fingerprint():
        raise UsageError(
            "the training images and the test images are the same files",
            hint="give a folder with train/ and test/, or other images as test=",
        )
    return training, testing


def _open_test(address: str | Path, class_names: str | Path | Mapping[str, str] | None) -> Source:
    """The part of a source to test on, whatever its name; all of a source without parts."""
    errors = []
    for split in _SPLITS:
        try:
            return open_source(address, class_names=class_names, split=split)
        except SourceError as error:
            errors.append(error)
    raise errors[0]


def choose_size(protocol: Protocol, size: int | None, test: Source) -> int:
    """Return the side at which students train and test: prescribed, chosen, or of the images."""
    if size is not None and protocol.size not in (None, size):
        raise UsageError(
            f"protocol {protocol.name} is published at {protocol.size} px, not {size}",
            hint="leave the size out, or choose protocol quick or eccv24",
        )
    return protocol.size or size or common_size(test)


def _compare(name: str, plan: _Plan) -> Evaluation:
    """Train the students that are missing, and put everything side by side."""
    pack, bench = plan.pack, plan.bench
    made = plan.entries(Shard())
    entries = list(filter(None, (made[row] for row in range(plan.compared))))
    results = tuple(bench.run(entry, plan.seeds) for entry in entries)
    sweep = run_sweep(plan.swept, bench, plan.seeds) if plan.axes else []
    history = results[0].histories[0]
    return Evaluation(
        name,
        bench.shared.where,
        pack,
        plan.protocol,
        results,
        LedgerView.of(pack, jpeg_bytes(bench.train)),
        bench.decode_seconds(pack),
        {
            "student": bench.protocol.student,
            "size": bench.train.size,
            "seeds": plan.seeds,
            "updates": history.updates,
            "batch": history.batch,
            "test_images": len(bench.test.images),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": bench.device,
            "bfloat16": fast_bfloat16(bench.device),
        },
        _sample_images(pack, bench, entries),
        tuple(sweep),
    )


class _Plan:
    """What students are trained on: entries, and baselines, of which some turn out to be none.

    The first rows are `compared`; those behind are variants of a sweep.
    """

    def __init__(
        self,
        pack: Pack,
        bench: Bench,
        protocol: Protocol,
        settings: EvalSettings,
        axes: Mapping[str, Sequence[str]],
    ) -> None:
        self.pack, self.bench, self.protocol = pack, bench, protocol
        self.settings, self.axes = settings, axes
        self.seeds = settings.seeds or bench.protocol.seeds
        learn = learner(pack, bench.train.source, bench.work, settings)
        with turn(bench.shared, bench.work / "sweep", "packs of the sweep", bench.events):
            self.swept = variants(pack, axes, learn)
        chosen = [baseline for name, baseline in BASELINES.items() if name in settings.baselines]
        rows: list[Entry | Baseline] = [*pack_entries(bench, pack), *chosen]
        self.compared = len(rows)
        self._rows = [*rows, *(sweep_entry(variant, bench) for variant in self.swept[1:])]

    def students(self, shard: Shard) -> list[tuple[int, int]]:
        """Return the row and the seed of all students of a share."""
        units = range(len(self._rows) * self.seeds)
        return [divmod(unit, self.seeds) for unit in units if shard.owns(unit)]

    def entries(self, shard: Shard) -> dict[int, Entry | None]:
        """Make the entries that a share needs, by row, once its time is known and allowed.

        Whether images fit at all is known only after the pilots: such baselines count as entries.
        """
        bench, budget, students = self.bench, sent_bytes(self.pack), self.students(shard)
        rows = {row: self._rows[row] for row, _ in students}
        later = {
            row: baseline
            for row, baseline in rows.items()
            if isinstance(baseline, Baseline)
            and any(bench.needs_pilots(f, budget, baseline.choice) for f in baseline.payloads)
        }
        made = {row: self._make(what) for row, what in rows.items() if row not in later}
        undone = [
            entry
            for row, seed in students
            if (entry := made.get(row)) is not None and not bench.finished(entry, seed)
        ]
        more = sum(row in later for row, _ in students)
        formats = [(format, b.choice) for b in later.values() for format in b.payloads]
        images, allow_long = len(self.pack), self.settings.allow_long
        _check_time(bench, undone, more, [f for f, _ in formats], images, allow_long=allow_long)
        if shard.count > 1:
            bench.share_pilots(formats, budget)
        return made | {row: self._make(baseline) for row, baseline in later.items()}

    def _make(self, what: Entry | Baseline) -> Entry | None:
        return what if isinstance(what, Entry) else what.make(self.bench, self.pack)


def _check_time(
    bench: Bench,
    undone: Sequence[Entry],
    more: int,
    formats: Sequence[PayloadFormat],
    images: int,
    *,
    allow_long: bool,
) -> None:
    """Note how long the missing students take; refuse hours that the user has not allowed.

    `undone` has an entry for each of them; pilots of `formats` come before `more` of them.
    """
    missing = len(undone) + more
    bench.expect(missing)
    if missing == 0:
        return
    short, long = 0, 0
    for format in formats:
        few, whole = pilots_of(len(candidates(format, bench.train.size)))
        short, long = short + few, long + whole
    pilots, each = short + long, bench.seconds_each(images)
    pilot = each / max(1, len(bench.protocol.rates))  # of full length; it has one rate
    total = each * missing + pilot * (short / PILOT_SHARE + long)
    wholes = sum(entry.whole for entry in undone)
    if wholes and bench.protocol.whole is not None:
        total += (bench.seconds_each(sum(bench.train.counts), whole=True) - each) * wholes
    work = count(missing, "student") + (f" and {count(pilots, 'pilot')}" if pilots else "")
    bench.note(f"{work} to train, about {duration(each)} a student: {duration(total)}")
    if total > LONG and not allow_long:
        quick = bench.protocol.name == "quick"
        shorter = "fewer baselines or seeds" if quick else "protocol quick"
        raise UsageError(
            f"{work} of protocol {bench.protocol.name}: about {duration(total)} on this machine",
            code="E_LONG",
            hint="start it with allow_long=True (it can be stopped and resumed), or choose"
            f" {shorter}",
        )


def jpeg_bytes(train: RealImages) -> float:
    """Return the mean bytes of a real image as a JPEG file of quality 75."""
    sample = train.draw(min(10, min(train.counts)), 0)
    return file_bytes(sample.images, PayloadSettings(JPEG_FILES, 75, train.size))


def _sample_images(pack: Pack, bench: Bench, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The first images of each class, by title: real ones, and those of every pack."""
    shown = min(_SHOWN, pack.images_per_class)
    real = bench.train.by_class(min(shown, min(bench.train.counts)), 0)
    images = {"real images": torch.stack(real)}
    for entry in entries:
        if entry.pack is not None and not entry.hard:
            images[entry.title] = bench.first(entry.pack, shown)
    return images
