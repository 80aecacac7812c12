"""A whole evaluation: the pack, its baselines, the ledger beside each, in one result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3pack import __version__
from d3pack.backbones import open_backbone
from d3pack.decode import unpack_backbone
from d3pack.errors import UsageError
from d3pack.evaluate import baselines, scores
from d3pack.evaluate import sweep as sweeps
from d3pack.evaluate.baselines import Arm
from d3pack.evaluate.bench import ArmResult, Bench, Progress, Report
from d3pack.evaluate.ledger import LedgerView, sent, view
from d3pack.evaluate.patience import check_patience
from d3pack.evaluate.payload import Form, Layout, Squeeze, candidates, file_bytes
from d3pack.evaluate.presets import Preset, Updates
from d3pack.evaluate.real import Labelled, RealImages, common_size
from d3pack.evaluate.teacher import Judge, open_judge
from d3pack.evaluate.training import plan, statistics
from d3pack.evaluate.workdir import Workdir, write_json
from d3pack.format.pack import Pack
from d3pack.sources import Source

# Real images in equal bytes: as files of two formats, and as one sheet of two.
PAYLOADS: dict[str, tuple[Form, Layout]] = {
    "jpeg": ("JPEG", "files"),
    "webp": ("WEBP", "files"),
    "sheet": ("WEBP", "sheet"),
    "avif": ("AVIF", "sheet"),
}
BASELINES = ("random", *PAYLOADS, "names", "collages", "whole")
DEFAULT_BASELINES = ("random", *PAYLOADS, "names")
_SHOWN = 8  # images of each class on a contact sheet
_STATISTICS = 100  # real images of each class for mean and deviation


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is compared, and how."""

    preset: Preset
    seeds: int = 3
    student: str | None = None
    size: int | None = None
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    device: str = "cpu"
    backbone: str | Path | None = None
    teacher: str | None = None  # "train" or a transformers classifier
    agreed: bool = False  # to a run of hours

    def __post_init__(self) -> None:
        unknown = sorted(set(self.baselines) - set(BASELINES))
        if unknown:
            raise UsageError(
                f"no baseline named {unknown[0]!r}", hint=f"some of {', '.join(BASELINES)}"
            )
        if self.seeds < 1:
            raise UsageError("an evaluation needs at least one seed")
        if "collages" in self.baselines and self.teacher is None:
            raise UsageError(
                "collages are chosen by a teacher",
                hint="give --teacher train, or a transformers classifier",
            )


@dataclass(frozen=True, slots=True)
class Sheets:
    """A few images of each kind, class by class, for the report."""

    real: Tensor  # uint8 (C, n, 3, s, s)
    pack: Tensor
    names: Tensor | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was found."""

    pack: Pack
    preset: Preset
    results: tuple[ArmResult, ...]
    ledger: LedgerView
    decode_seconds: float
    facts: Mapping[str, Any]
    sheets: Sheets
    sweep: tuple[Mapping[str, Any], ...] = field(default=())

    def get(self, key: str) -> ArmResult | None:
        """The result whose key begins so."""
        return next((r for r in self.results if r.arm.key.split("-")[0] == key), None)

    def scores(self) -> dict[str, float]:
        """DD-Ranking's scores, those that the runs allow."""
        found: dict[str, float] = {}
        pack, hard = self.get("pack"), self.get("hard") or self.get("pack")
        random, whole = self.get("random"), self.get("whole")
        if pack is not None and random is not None:
            found["IOR"] = scores.improvement_over_random(pack.last.mean, random.last.mean)
        if hard is not None and whole is not None:
            found["HLR"] = scores.hard_label_recovery(whole.last.mean, hard.last.mean)
        if len(found) == 2:
            found["LRS"] = scores.label_robust_score(found["HLR"], found["IOR"])
        return found

    def to_json(self) -> dict[str, Any]:
        preset = json.loads(json.dumps(asdict(self.preset), default=str))
        return {
            "d3pack": __version__,
            "pack": {
                "root": self.pack.root,
                "classes": list(self.pack.classes),
                "images_per_class": self.pack.images_per_class,
                "recipe": self.pack.manifest["recipe"],
            },
            "preset": preset,
            "facts": dict(self.facts),
            "ledger": self.ledger.to_json(),
            "decode_seconds": self.decode_seconds,
            "scores": self.scores(),
            "arms": [result.to_json() for result in self.results],
            "sweep": [dict(point) for point in self.sweep],
        }


def choose_size(preset: Preset, wanted: int | None, test: Source) -> int:
    """The side at which students train and test."""
    if wanted is not None and preset.size not in (None, wanted):
        raise UsageError(
            f"preset {preset.name} is published at {preset.size} px, not {wanted}",
            hint="drop --size, or use quick or eccv24",
        )
    if wanted is not None and not 8 <= wanted <= 1024:
        raise UsageError(f"--size {wanted} is no image size", hint="between 8 and 1024")
    return preset.size or wanted or common_size(test)


def make_bench(
    classes: Sequence[str],
    images: int,
    train: RealImages,
    test: RealImages,
    workdir: Workdir,
    options: EvalOptions,
    *,
    judge: Judge | None = None,
    report: Report = lambda text: None,
    progress: Progress | None = None,
) -> Bench:
    """The bench for a pack of so many images: its number of steps holds for every baseline."""
    preset = options.preset
    updates = None
    if not isinstance(preset.length, Updates):
        updates = plan(preset, images, len(classes)).updates
    several = train.draw(min(_STATISTICS, max(train.counts)), 0)
    relabel = judge.logits if judge is not None and preset.labels == "teacher" else None
    return Bench(
        preset,
        classes,
        test.all(),
        f"{test.fingerprint()}@{test.size}",
        workdir,
        mean_std=statistics(several.images),
        student=options.student,
        updates=updates,
        device=options.device,
        backbone=options.backbone,
        teacher=relabel,
        report=report,
        progress=progress,
    )


def pack_arms(pack: Pack, bench: Bench) -> list[Arm]:
    """The pack, and with soft labels also the pack on hard labels alone."""
    total = pack.ledger().total
    arms = [baselines.pack_arm("pack", "this pack", pack, bench.training_set, total)]
    if pack.labels is not None:
        bare = total - pack.ledger().sections["labels"]
        title = "this pack, hard labels alone"
        arms.append(baselines.pack_arm("hard", title, pack, bench.training_set, bare, hard=True))
    return arms


def names_of(pack: Pack, options: EvalOptions) -> Pack | None:
    """The pack's twin that is prompted by class names; None where the pack is that already."""
    place = options.backbone or unpack_backbone(pack)
    opened = open_backbone(pack.recipe.backbone, path=place, device=options.device)
    twin = baselines.names_pack(pack, opened.name_vectors, opened.prompt_shape[0])
    return None if baselines.prompted_by_names(pack, twin) else twin


def baseline_arms(
    pack: Pack,
    train: RealImages,
    bench: Bench,
    options: EvalOptions,
    workdir: Workdir,
    judge: Judge | None = None,
    twin: Pack | None = None,
) -> list[Arm]:
    """The baselines that were asked for, their trade-offs chosen; `twin` is the names' pack."""
    wanted = options.baselines
    arms: list[Arm] = []
    if "random" in wanted:
        arms.append(baselines.random_images(train, pack.images_per_class))
    budget = sent(pack)
    chosen: dict[str, Squeeze] = {}
    for payload in needed_payloads(wanted):
        squeeze, pilot = squeeze_for(train, budget, bench, payload, workdir)
        if squeeze is None:
            bench.report(f"{payload}: not one image fits into {budget} bytes")
            continue
        chosen[payload] = squeeze
        if payload in wanted:
            arms.append(baselines.equal_bytes(train, budget, squeeze, pilot))
    if "collages" in wanted and "sheet" in chosen and judge is not None:
        squeeze = chosen["sheet"]
        arms.append(baselines.collages(judge.patches, train, budget, squeeze, judge.identity))
    if twin is not None:
        free = twin.ledger().total - baselines.prompt_bytes(twin)
        title = "class names as prompts, same backbone"
        arms.append(baselines.pack_arm("names", title, twin, bench.training_set, free))
    if "whole" in wanted:
        arms.append(baselines.whole_set(train))
    return arms


def needed_payloads(wanted: Sequence[str]) -> list[str]:
    """The payloads whose trade-off must be chosen; collages travel as a sheet."""
    return [p for p in PAYLOADS if p in wanted or (p == "sheet" and "collages" in wanted)]


def pilot_place(
    train: RealImages, budget: int, bench: Bench, payload: str, workdir: Workdir
) -> Path:
    """Where the choice of a trade-off is remembered."""
    identity = {**bench.identity, "real": train.fingerprint()}
    return workdir.place(f"pilot-{payload}-{budget}", identity, 0)


def squeeze_for(
    train: RealImages, budget: int, bench: Bench, payload: str, workdir: Workdir
) -> tuple[Squeeze | None, dict[str, float]]:
    """The trade-off of a budget, remembered between runs."""
    place = pilot_place(train, budget, bench, payload, workdir)
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        found = data["squeeze"]
        return (Squeeze(**found) if found else None), data["pilot"]
    except (OSError, ValueError, KeyError, TypeError):
        form, layout = PAYLOADS[payload]
        squeeze, pilot = baselines.choose_squeeze(
            train, budget, form, layout, bench.pilot, bench.report
        )
        write_json(place, {"squeeze": asdict(squeeze) if squeeze else None, "pilot": pilot})
        return squeeze, pilot


def evaluate(
    pack: Pack,
    train: RealImages,
    test: RealImages,
    options: EvalOptions,
    workdir: Workdir,
    *,
    sweep: Mapping[str, Sequence[str]] = {},
    report: Report = lambda text: None,
    progress: Progress | None = None,
) -> Evaluation:
    """Train everything that is missing, and put it side by side."""
    judge = None
    if options.teacher is not None:
        judge = open_judge(options.teacher, train, workdir, options.device, report)
    bench = make_bench(
        pack.classes,
        len(pack),
        train,
        test,
        workdir,
        options,
        judge=judge,
        report=report,
        progress=progress,
    )
    first = pack_arms(pack, bench)
    learn = sweeps.learner(
        pack, train.source, workdir, backbone=options.backbone, teacher=options.teacher
    )
    swept = sweeps.variants(pack, sweep, learn)
    twin = names_of(pack, options) if "names" in options.baselines else None
    if "names" in options.baselines and twin is None:
        report("names: left out, the prompts of this pack are its backbone's own class table")

    def arms_of(wanted: tuple[str, ...]) -> list[Arm]:
        chosen = replace(options, baselines=wanted)
        return first + baseline_arms(pack, train, bench, chosen, workdir, judge, twin)

    # Whether images fit at all is known only after the pilots: such baselines are counted one each.
    unknown = [
        name
        for name in needed_payloads(options.baselines)
        if not pilot_place(train, sent(pack), bench, name, workdir).exists()
    ]
    certain = tuple(
        name
        for name in options.baselines
        if name not in unknown and not (name == "collages" and "sheet" in unknown)
    )
    arms = arms_of(certain)
    check_patience(
        bench,
        [*arms, *(sweeps.arm(variant, bench) for variant in swept[1:])],
        options,
        len(pack),
        later=len(options.baselines) - len(certain),
        pilots=sum(len(candidates(*PAYLOADS[name], train.size)) for name in unknown),
    )
    if unknown:
        arms = arms_of(options.baselines)
    results = tuple(bench.run(arm, options.seeds) for arm in arms)
    points = sweeps.run(swept, bench, options.seeds) if sweep else []
    shown = min(_SHOWN, pack.images_per_class)
    sheets = make_sheets(pack, train, bench, twin, shown)
    jpeg = file_bytes(
        train.draw(min(10, min(train.counts)), 0).images, Squeeze("JPEG", "files", 75, train.size)
    )
    return Evaluation(
        pack,
        options.preset,
        results,
        view(pack, jpeg),
        decode_seconds(pack, bench, workdir),
        {
            "student": bench.student,
            "size": test.size,
            "seeds": options.seeds,
            "updates": results[0].histories[0].updates,
            "batch": results[0].histories[0].batch,
            "test_images": len(bench.test.images),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": options.device,
        },
        sheets,
        tuple(points),
    )


def decode_seconds(pack: Pack, bench: Bench, workdir: Workdir) -> float:
    """Seconds to decode the whole pack here: measured once, then remembered."""
    place = workdir.path / f"decode-{pack.root[:12]}.json"
    try:
        return float(json.loads(place.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        seconds = bench.decode(pack).seconds
        write_json(place, {"seconds": seconds, "images": len(pack)})
        return seconds


def make_sheets(
    pack: Pack, train: RealImages, bench: Bench, twin: Pack | None, shown: int
) -> Sheets:
    """The first images of each class: real ones, the pack's, and those of bare class names."""
    drawn: Labelled = train.draw(min(shown, min(train.counts)), 0)
    real = torch.stack([drawn.images[drawn.labels == c] for c in range(len(pack.classes))])
    names = None if twin is None else bench.first(twin, shown)
    return Sheets(real, bench.first(pack, shown), names)
