"""The bench: students of every entry, under one protocol, with the same steps and the same test."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from d3pack.backbones import Backbone, open_backbone
from d3pack.dataset import D3MDataset
from d3pack.decode import unpack_backbone
from d3pack.evaluate.entries import Choice, Entry, PayloadFormat, PayloadSettings
from d3pack.evaluate.payload import Choose, choose_settings
from d3pack.evaluate.teacher import OrderedTeacher
from d3pack.evaluate.turns import turn
from d3pack.format import Pack
from d3pack.students import (
    PILOT_SHARE,
    History,
    Intervals,
    LabelledImages,
    Protocol,
    RealImages,
    Updates,
    lengths,
    seconds_needed,
    statistics,
    train_student,
)
from d3pack.system import Events, SharedFolder, count, duration, resolve_device, write_json

FORMAT = 2  # raised when a change of the code makes older students incomparable
_STATISTICS = 100  # real images of each class for mean and deviation


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over seeds; 0 for one seed."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one value per seed."""
        std = stdev(values) if len(values) > 1 else 0.0
        return cls(fmean(values), std)


@dataclass(frozen=True, slots=True)
class EntryResult:
    """An entry with its students, trained and tested."""

    entry: Entry
    histories: tuple[History, ...]
    nbytes: tuple[int | None, ...]  # by seed
    notes: tuple[str, ...]

    @property
    def last(self) -> Spread:
        """Accuracy at the end of training."""
        return Spread.of([history.last for history in self.histories])

    @property
    def best(self) -> Spread:
        """The best accuracy during training."""
        return Spread.of([history.best for history in self.histories])

    @property
    def mean_bytes(self) -> float | None:
        """Bytes to send, without backbone; None where nobody would send the images."""
        known = [n for n in self.nbytes if n is not None]
        return sum(known) / len(known) if known else None

    @property
    def needs_backbone(self) -> bool:
        """Whether a backbone has to make the images."""
        return self.entry.pack is not None

    def to_json(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        return {
            "key": self.entry.key,
            "title": self.entry.title,
            "hard_labels": self.entry.hard,
            "needs_backbone": self.needs_backbone,
            "detail": dict(self.entry.detail),
            "bytes": self.mean_bytes,
            "notes": sorted(set(filter(None, self.notes))),
            "last": {"mean": self.last.mean, "std": self.last.std},
            "best": {"mean": self.best.mean, "std": self.best.std},
            "runs": [history.to_json() for history in self.histories],
        }


def _read_json(path: Path) -> Any:
    """What a file holds; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Bench:
    """Trains the students of entries under one protocol, and keeps the finished ones.

    Args:
        train: real training images.
        test: real test images.
        images: images in the pack: they set the number of steps, which holds for every entry.
        protocol: how students are trained and tested.
        work: directory that keeps finished students.
        device: where students are trained and packs decoded; None: CUDA where there is one.
        backbone: diffusion model of the packs, where it is not the one that they name.
        teacher: chooses collages, and labels where the protocol asks for it.
        events: what to report to.
    """

    def __init__(
        self,
        train: RealImages,
        test: RealImages,
        images: int,
        protocol: Protocol,
        work: Path | SharedFolder,
        *,
        device: str | None = None,
        backbone: str | Path | None = None,
        teacher: OrderedTeacher | None = None,
        events: Events | None = None,
    ) -> None:
        self.train, self.test = train, test.all()
        self.teacher, self.events = teacher, events or Events()
        self.shared = work if isinstance(work, SharedFolder) else SharedFolder(work)
        self.work = self.shared.local
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = str(resolve_device(device))
        self.updates: int | None = None
        protocol = protocol.settled(len(train.classes), size=train.size)
        if not isinstance(protocol.length, Updates):
            self.updates = lengths(protocol, images, len(train.classes)).updates
        self.protocol = self._normalised(protocol)
        self.identity = self._identity(f"{test.fingerprint()}@{test.size}")
        self._backbone = backbone
        self._decoded: dict[str, tuple[LabelledImages, float]] = {}
        self._expected = self.trained = 0  # students
        self._seconds = 0.0

    def _normalised(self, protocol: Protocol) -> Protocol:
        """The protocol, and its own for the whole set, with figures for "data"."""
        if protocol.whole is not None:
            whole = protocol.whole.settled(
                len(self.train.classes), student=protocol.student, size=protocol.size
            )
            protocol = replace(protocol, whole=self._normalised(whole))
        if protocol.normalise == "data":
            sample = self.train.draw(min(_STATISTICS, max(self.train.counts)), 0)
            protocol = replace(protocol, normalise=statistics(sample.images))
        return protocol

    def _way(self, entry: Entry) -> tuple[Protocol, int | None]:
        """How students of an entry are trained, and for how many updates; None: the protocol's."""
        if entry.whole and self.protocol.whole is not None:
            return self.protocol.whole, None
        protocol = replace(self.protocol, labels="hard") if entry.hard else self.protocol
        return protocol, self.updates

    def _identity(self, test: str) -> dict[str, Any]:
        """All that decides about accuracies beside the training set."""
        described = {"name", "source", "seeds"}
        values = {
            field.name: repr(getattr(self.protocol, field.name))
            for field in fields(Protocol)
            if field.name not in described
        }
        if self.protocol.labels == "teacher" and self.teacher is not None:
            values["teacher"] = self.teacher.identity
        return {"protocol": values, "updates": self.updates, "test": test}

    def note(self, text: str) -> None:
        """Report one line for a person."""
        self.events.note(text)

    def decode(self, pack: Pack) -> LabelledImages:
        """Return all images of a pack, with its soft labels where it has some."""
        return self._decode(pack)[0]

    def _decode(self, pack: Pack) -> tuple[LabelledImages, float]:
        """The images of a pack, and the seconds that they took."""
        if pack.root not in self._decoded:
            data = D3MDataset(
                pack,
                device=self.device,
                soft_labels=pack.labels is not None,
                weights=pack.weights is not None,
                cache="cpu",
                backbone=self._backbone,
            )
            began = time.monotonic()
            batches = list(data.loader(64, shuffle=False))
            seconds = time.monotonic() - began
            columns = [torch.cat([part.cpu() for part in c]) for c in zip(*batches, strict=True)]
            images, given = columns[:2]
            weights = columns[2] if pack.weights is not None else None
            soft = None if pack.labels is None else given
            labels = torch.arange(len(pack.classes)).repeat_interleave(pack.images_per_class)
            content = LabelledImages(images, labels, soft=soft, weights=weights)
            self._decoded[pack.root] = content, seconds
        return self._decoded[pack.root]

    def decode_seconds(self, pack: Pack) -> float:
        """Return the seconds to decode all of a pack here: measured once, then remembered."""
        place = self.work / f"decode-{pack.root[:12]}.json"
        known = _read_json(place)
        if isinstance(known, dict) and "seconds" in known:
            return float(known["seconds"])
        seconds = self._decode(pack)[1]
        write_json(place, {"seconds": seconds, "images": len(pack)})
        return seconds

    def first(self, pack: Pack, count: int) -> Tensor:
        """Return the first images of each class, (C, count, 3, H, W), decoding no others."""
        decoded = pack if pack.root in self._decoded else pack.first(count)
        images = self.decode(decoded).images
        return images.view(len(pack.classes), -1, *images.shape[1:])[:, :count]

    def open_backbone(self, pack: Pack) -> Backbone:
        """Open the backbone of a pack."""
        place = self._backbone or unpack_backbone(pack)
        return open_backbone(pack.recipe.backbone, path=place, device=self.device)

    def finished(self, entry: Entry, seed: int) -> bool:
        """Return whether a student need not be trained any more."""
        return self._load(self._place(entry.key, entry.identity, seed)) is not None

    def _place(self, key: str, identity: Mapping[str, Any], seed: int) -> Path:
        """The file of a student, or of a choice: its name holds all that decides about it."""
        text = json.dumps({"format": FORMAT, **self.identity, **identity}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.work / f"{key}-{digest}-seed{seed}.json"

    def _load(self, place: Path) -> tuple[History, dict[str, Any]] | None:
        """A finished student, and the facts about its training set."""
        try:
            data = _read_json(place)
            return History.from_json(data["history"]), data["set"]
        except (KeyError, TypeError, ValueError):
            return None

    def run(self, entry: Entry, seeds: int) -> EntryResult:
        """Return an entry with its students; those that are missing are trained now."""
        histories, sizes, notes = [], [], []
        for seed in range(seeds):
            history, facts = self.student(entry, seed)
            histories.append(history)
            sizes.append(facts["bytes"])
            notes.append(facts["note"])
        return EntryResult(entry, tuple(histories), tuple(sizes), tuple(notes))

    def student(self, entry: Entry, seed: int) -> tuple[History, dict[str, Any]]:
        """Return a student and the facts about its training set; one process trains it."""
        place = self._place(entry.key, entry.identity, seed)
        known = self._load(place)
        if known is None:
            with turn(self.shared, place, f"{entry.title}, seed {seed}", self.events):
                known = self._load(place) or self._train(entry, seed, place)
        return known

    def _train(self, entry: Entry, seed: int, place: Path) -> tuple[History, dict[str, Any]]:
        content = entry.build(seed)
        protocol, updates = self._way(entry)
        title = f"{entry.title}, seed {seed}"
        steps = lengths(protocol, len(content.images), len(self.train.classes), updates).updates
        rates = protocol.rates or (protocol.optimizer.lr,)
        with self.events.stage(title, steps * len(rates), "updates"):
            tried = []
            for turn, rate in enumerate(rates):
                at_rate = replace(protocol, optimizer=replace(protocol.optimizer, lr=rate))

                def progress(done: int, total: int, turn: int = turn) -> None:
                    self.events.step(turn * steps + done)

                student = train_student(
                    content,
                    self.test,
                    at_rate,
                    seed,
                    classes=len(self.train.classes),
                    updates=updates,
                    teacher=self.teacher.logits if self.teacher is not None else None,
                    device=self.device,
                    checkpoint=place.with_name(f"{place.stem}-{turn}.safetensors"),
                    progress=progress,
                )
                tried.append(student)
        seconds = sum(student.seconds for student in tried)
        history = replace(max(tried, key=lambda student: student.best), seconds=seconds)
        facts = {"bytes": content.nbytes, "note": content.note, "title": entry.title}
        write_json(place, {"history": history.to_json(), "set": facts})
        for checkpoint in place.parent.glob(f"{place.stem}-*.safetensors"):
            checkpoint.unlink(missing_ok=True)
        self.trained += 1
        self._seconds += history.seconds
        left = ""
        if self._expected > self.trained:
            more = self._expected - self.trained
            time_left = duration(self._seconds / self.trained * more)
            left = f"; {count(more, 'student')} left, about {time_left}"
        self.note(f"{title}: {100 * history.last:.1f} % in {history.seconds:.0f} s{left}")
        return history, facts

    def expect(self, students: int) -> None:
        """Set how many students are still to come, for the time that is left."""
        self._expected = self.trained + students

    def payload_settings(
        self, formats: Sequence[PayloadFormat], budget: int, choice: Choice | None = None
    ) -> tuple[PayloadSettings | None, dict[str, float]]:
        """Return how photographs are best compressed into so many bytes, as `choose_settings` does.

        Pilots decide, once; the work directory remembers their choice. With a `choice` they learn
        from what is chosen.
        """
        best: tuple[float, PayloadSettings | None] = (-1.0, None)
        scores: dict[str, float] = {}
        for format in formats:
            known = self._chosen_before(format, budget, choice)
            if known is None:
                place = self._pilot_place(format, budget, choice)
                with turn(self.shared, place, f"pilots of {format.title}", self.events):
                    known = self._chosen_before(format, budget, choice)
                    known = known or self._choose(format, budget, choice)
            scores |= known["pilot"]
            if known["settings"] is not None:
                settings = PayloadSettings(format, **known["settings"])
                best = max(best, (known["score"], settings), key=lambda pair: pair[0])
        if best[1] is None:
            titles = " or ".join(format.title for format in formats)
            self.note(f"{titles}: not one image fits into {count(budget, 'byte')}")
        return best[1], scores

    def _choose(self, format: PayloadFormat, budget: int, choice: Choice | None) -> dict[str, Any]:
        place = self._pilot_place(format, budget, choice)
        before = _read_json(place)
        done: dict[str, float] = before.get("done", {}) if isinstance(before, dict) else {}

        def pilot(content: LabelledImages, test: LabelledImages, whole: bool) -> float:
            name = f"{content.note}, {'whole' if whole else 'short'}"
            if name not in done:
                done[name] = self._pilot(content, test, whole)
                write_json(place, {"done": done})  # a stopped run goes on here
            return done[name]

        choose = self.chooser(choice) if choice else None
        tuned = choose_settings(self.train, budget, format, pilot, self.note, choose)
        chosen = tuned.settings
        known = {
            "settings": {"quality": chosen.quality, "side": chosen.side} if chosen else None,
            "score": tuned.score,
            "pilot": dict(tuned.scores),
        }
        write_json(place, known)
        return known

    def chooser(self, choice: Choice) -> Choose | None:
        """Return what chooses photographs; None where it takes a teacher and there is none."""
        if choice.select is not None:
            return partial(choice.select, self.train)
        return partial(self.teacher.patches, choice) if self.teacher else None

    def teacher_of(self, choice: Choice) -> dict[str, str]:
        """Return what results of a choice are kept under, beside its name: its teacher, if any."""
        if choice.select is not None or self.teacher is None:
            return {}
        return {"teacher": self.teacher.identity}

    def share_pilots(
        self, formats: Iterable[tuple[PayloadFormat, Choice | None]], budget: int
    ) -> None:
        """Run the pilots that are missing, but for those that other processes run now."""
        for format, choice in formats:
            path = self._pilot_place(format, budget, choice).with_suffix(".lock")
            with ExitStack() as held:
                try:
                    held.enter_context(self.shared.alone(path))
                except BlockingIOError:
                    continue
                if self.needs_pilots(format, budget, choice):
                    self._choose(format, budget, choice)

    def needs_pilots(
        self, format: PayloadFormat, budget: int, choice: Choice | None = None
    ) -> bool:
        """Return whether pilots must still choose how photographs are compressed."""
        return self._chosen_before(format, budget, choice) is None

    def _chosen_before(
        self, format: PayloadFormat, budget: int, choice: Choice | None
    ) -> dict[str, Any] | None:
        known = _read_json(self._pilot_place(format, budget, choice))
        complete = isinstance(known, dict) and known.keys() >= {"settings", "pilot", "score"}
        return known if complete else None

    def _pilot_place(self, format: PayloadFormat, budget: int, choice: Choice | None) -> Path:
        identity = {"real": self.train.fingerprint(), "format": repr(format), "pilots": "whole"}
        if choice is not None and self.chooser(choice) is not None:
            identity |= {"choice": repr(choice), **self.teacher_of(choice)}
        return self._place(f"pilot-{format.name}-{budget}", identity, 0)

    def _pilot(self, content: LabelledImages, test: LabelledImages, whole: bool) -> float:
        """Accuracy of a student on other images, on which it is tested once.

        Unless `whole`, it has a quarter of the updates.
        """
        classes = len(self.train.classes)
        length = lengths(self.protocol, len(content.images), classes, self.updates)
        protocol = replace(self.protocol, labels="hard", mix=None, tests=Intervals())
        updates = max(1, length.updates // (1 if whole else PILOT_SHARE))
        with self.events.stage("pilot", updates, "updates"):
            return train_student(
                content,
                test,
                protocol,
                int(whole),  # another seed: a lucky one does not count twice
                classes=classes,
                updates=updates,
                device=self.device,
                progress=lambda done, total: self.events.step(done),
            ).last

    def seconds_each(self, images: int, *, whole: bool = False) -> float:
        """Return how long one student takes on this machine; `whole`: as of all real images."""
        protocol = (self.protocol.whole if whole else None) or self.protocol
        each = seconds_needed(
            protocol,
            len(self.train.classes),
            self.train.size,
            images,
            len(self.test.images),
            device=self.device,
        )
        return each * max(1, len(protocol.rates))
