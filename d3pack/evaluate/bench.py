"""The bench: every training set meets the same students, the same steps and the same test."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3pack.dataset import D3MDataset
from d3pack.evaluate.baselines import Arm
from d3pack.evaluate.presets import Preset
from d3pack.evaluate.real import Labelled
from d3pack.evaluate.scores import Spread
from d3pack.evaluate.training import History, Teach, plan, seconds_needed, train_student
from d3pack.evaluate.workdir import Workdir, protocol
from d3pack.format.pack import Pack
from d3pack.system.text import count, duration

PILOT_SHARE = 4  # a pilot has a quarter of the updates
Report = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One row of a comparison, trained and tested."""

    arm: Arm
    histories: tuple[History, ...]
    nbytes: tuple[int | None, ...]  # by seed
    notes: tuple[str, ...]

    @property
    def last(self) -> Spread:
        return Spread.of([history.last for history in self.histories])

    @property
    def best(self) -> Spread:
        return Spread.of([history.best for history in self.histories])

    @property
    def mean_bytes(self) -> float | None:
        known = [n for n in self.nbytes if n is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.arm.key,
            "title": self.arm.title,
            "hard_labels": self.arm.hard,
            "needs_backbone": self.arm.needs_backbone,
            "detail": dict(self.arm.detail),
            "bytes": self.mean_bytes,
            "notes": sorted(set(filter(None, self.notes))),
            "last": {"mean": self.last.mean, "std": self.last.std},
            "best": {"mean": self.best.mean, "std": self.best.std},
            "runs": [history.to_json() for history in self.histories],
        }


@dataclass(frozen=True, slots=True)
class Decoded:
    """The images of a pack, and how long they took."""

    images: Tensor
    labels: Tensor
    seconds: float


class Bench:
    """Trains students under one protocol and remembers the finished ones."""

    def __init__(
        self,
        preset: Preset,
        classes: Sequence[str],
        test: Labelled,
        test_id: str,
        workdir: Workdir,
        *,
        mean_std: tuple[tuple[float, ...], tuple[float, ...]],
        student: str | None = None,
        updates: int | None = None,
        device: str = "cpu",
        backbone: str | Path | None = None,
        teacher: Teach | None = None,
        report: Report = lambda text: None,
        progress: Progress | None = None,
    ) -> None:
        self.preset = preset
        self.classes = tuple(classes)
        self.test = test
        self.workdir = workdir
        self.student = student or preset.student
        self.updates = updates
        self.device = device
        self.report = report
        self._mean_std = mean_std
        self._backbone = backbone
        self._teacher = teacher
        self._progress = progress
        self._protocol = protocol(preset, self.student, updates, test_id)
        self._decoded: dict[str, Decoded] = {}
        self._expected = self._trained = 0
        self._spent = 0.0

    def decode(self, pack: Pack) -> Decoded:
        """All images of a pack, through D3MDataset, with its soft labels where it has some."""
        if pack.root not in self._decoded:
            data = D3MDataset(
                pack,
                device=self.device,
                soft_labels=pack.labels is not None,
                cache="cpu",
                backbone=self._backbone,
            )
            began = time.monotonic()
            batches = list(data.loader(64, shuffle=False))
            seconds = time.monotonic() - began
            images = torch.cat([images.cpu() for images, _ in batches])
            labels = torch.cat([labels.cpu() for _, labels in batches])
            self._decoded[pack.root] = Decoded(images, labels, seconds)
        return self._decoded[pack.root]

    def first(self, pack: Pack, count: int) -> Tensor:
        """The first images of each class, (C, count, 3, H, W); the rest is not decoded for them."""
        whole = self._decoded.get(pack.root)
        images = whole.images if whole else self.decode(pack.first(count)).images
        return images.view(len(pack.classes), -1, *images.shape[1:])[:, :count]

    def training_set(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Images and labels of a pack."""
        found = self.decode(pack)
        return found.images, found.labels

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides about accuracies beside the training set."""
        return self._protocol

    def finished(self, arm: Arm, seed: int) -> bool:
        """Whether this student is there already."""
        return self.workdir.load(self._place(arm, seed)) is not None

    def _place(self, arm: Arm, seed: int) -> Path:
        return self.workdir.place(arm.key, {**arm.identity, **self._protocol}, seed)

    def run(self, arm: Arm, seeds: int) -> ArmResult:
        """The students of an arm, those that are missing trained now."""
        histories, sizes, notes = [], [], []
        for seed in range(seeds):
            place = self._place(arm, seed)
            found = self.workdir.load(place)
            if found is None:
                found = self._train(arm, seed, place)
            history, about = found
            histories.append(history)
            sizes.append(about["bytes"])
            notes.append(about["note"])
        return ArmResult(arm, tuple(histories), tuple(sizes), tuple(notes))

    def _train(self, arm: Arm, seed: int, place: Path) -> tuple[History, dict[str, Any]]:
        content = arm.build(seed)
        preset = replace(self.preset, labels="hard") if arm.hard else self.preset
        checkpoint = place.with_suffix(".safetensors")
        history = train_student(
            content.images,
            content.labels,
            self.test.images,
            self.test.labels,
            preset,
            seed,
            student=self.student,
            classes=len(self.classes),
            updates=self.updates,
            statistics_of=self._mean_std,
            teacher=self._teacher,
            device=self.device,
            checkpoint=checkpoint,
            progress=self._progress,
        )
        about = {"bytes": content.nbytes, "note": content.note, "title": arm.title}
        self.workdir.save(place, history, about)
        checkpoint.unlink(missing_ok=True)
        self._trained += 1
        self._spent += history.seconds
        left = ""
        if self._expected > self._trained:
            each = self._spent / self._trained
            more = self._expected - self._trained
            left = f"; {count(more, 'student')} left, about {duration(each * more)}"
        self.report(
            f"{arm.title}, seed {seed}: {100 * history.last:.1f} % in {history.seconds:.0f} s{left}"
        )
        return history, about

    def expect(self, students: int) -> None:
        """So many students are still to come: for the time that is left."""
        self._expected = self._trained + students

    def pilot(self, content: Labelled, judge: Labelled) -> float:
        """Accuracy of a student with a quarter of the updates, tested once on other images."""
        lengths = plan(self.preset, len(content.images), len(self.classes), self.updates)
        preset = replace(self.preset, labels="hard", mix=None, exams=type(self.preset.exams)())
        return train_student(
            content.images,
            content.labels,
            judge.images,
            judge.labels,
            preset,
            0,
            student=self.student,
            classes=len(self.classes),
            updates=max(1, lengths.updates // PILOT_SHARE),
            statistics_of=self._mean_std,
            device=self.device,
        ).last

    def seconds_each(self, images: int) -> float:
        """How long one student of this protocol takes on this machine."""
        size = min(self.test.images.shape[2:])
        return seconds_needed(
            self.preset,
            self.student,
            len(self.classes),
            size,
            images,
            len(self.test.images),
            device=self.device,
        )
