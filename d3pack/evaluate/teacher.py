"""The teacher of an evaluation: chooses collages, and relabels where a preset asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from d3pack.encode import EncodeSettings
from d3pack.evaluate.real import RealImages
from d3pack.evaluate.workdir import Workdir
from d3pack.system.events import Events
from d3pack.system.journal import Journal
from d3pack.teachers import (
    Cut,
    Teacher,
    TransformersTeacher,
    best_patches,
    teacher_cache,
    teacher_config,
    train_teacher,
)

POOL = 300  # images of each class that are looked at, as RDED does


@dataclass(frozen=True, slots=True)
class Judge:
    """A teacher in the class order of its source, and how a pack's classes lie in it."""

    teacher: Teacher
    real: RealImages
    _found: dict[int, list[Tensor]] = field(default_factory=dict)

    def logits(self, images: Tensor) -> Tensor:
        """Uint8 images -> logits in the pack's class order."""
        return self.teacher.logits(images)[:, list(self.real.order)]

    @property
    def identity(self) -> str:
        return str(self.teacher.record.get("sha256", self.teacher.record))

    def patches(self, per_class: int) -> list[Tensor]:
        """For each class of the pack the images it finds most real, best first.

        One whole image a patch: where images are small this is RDED's own setting (factor 1), and a
        sheet of tiles is the cheaper form of a collage of the same patches.
        """
        if per_class in self._found:
            return self._found[per_class]
        cut = Cut(size=(self.real.size, self.real.size), pool=max(per_class, POOL))
        found = []
        for place in self.real.order:
            patches = best_patches(self.real.source, place, self.teacher, cut)
            order = np.argsort(patches.costs, kind="stable")[:per_class]
            found.append(torch.from_numpy(patches.pixels[order]))
        self._found[per_class] = found
        return found


def open_judge(
    name: str,
    real: RealImages,
    workdir: Workdir,
    device: str,
    report: Callable[[str], None],
) -> Judge:
    """`train`: the small network that encode would fit to these images; else a transformers one."""
    source = real.source
    if name != "train":
        return Judge(TransformersTeacher(name, source.classes, device=device), real)

    def listen(event: dict[str, object]) -> None:
        if event["event"] == "note":
            report(str(event["text"]))

    lesson = teacher_config(real.size, EncodeSettings().teacher_samples, 0)
    folder = workdir.path / f"teacher-{source.fingerprint()[:12]}"
    journal = Journal(folder, {"source": source.fingerprint(), "lesson": repr(lesson)})
    try:
        teacher = train_teacher(
            source, lesson, journal, Events([listen]), cache=teacher_cache(), device=device
        )
    finally:
        journal.close()
    return Judge(teacher, real)
