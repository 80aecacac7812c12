"""The teacher of an evaluation: chooses collages, and labels where a protocol asks for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d3pack.encode import EncodeSettings
from d3pack.evaluate.real import RealImages
from d3pack.system import Events, Journal
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
class OrderedTeacher:
    """A teacher that answers in the class order of a pack, not of its source."""

    teacher: Teacher
    real: RealImages
    _patches: dict[int, list[Tensor]] = field(default_factory=dict)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits of uint8 images, in the pack's class order."""
        return self.teacher.logits(images)[:, list(self.real.order)]

    @property
    def identity(self) -> str:
        """Hash of the weights."""
        return str(self.teacher.record.get("sha256", self.teacher.record))

    def patches(self, per_class: int) -> list[Tensor]:
        """Return for each class of the pack the images that are most typical of it, best first.

        A patch is a whole image: for small images that is RDED's own setting (factor 1), and a
        sheet of tiles is the cheaper form of a collage of the same patches.
        """
        if per_class not in self._patches:
            cut = Cut(size=(self.real.size, self.real.size), pool=max(per_class, POOL))
            chosen = []
            for place in self.real.order:
                patches = best_patches(self.real.source, place, self.teacher, cut)
                order = np.argsort(patches.costs, kind="stable")[:per_class]
                chosen.append(torch.from_numpy(patches.pixels[order]))
            self._patches[per_class] = chosen
        return self._patches[per_class]


def open_teacher(
    name: str, real: RealImages, folder: Path, device: torch.device, events: Events
) -> OrderedTeacher:
    """Open a transformers classifier, or train the small network that encode trains ("train").

    `folder` keeps a training that was interrupted.
    """
    source = real.source
    if name != "train":
        return OrderedTeacher(TransformersTeacher(name, source.classes, device=str(device)), real)
    config = teacher_config(real.size, EncodeSettings().teacher_samples, 0, str(device))
    key = {"source": source.fingerprint(), "config": asdict(config)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    work = folder / f"teacher-{digest[:12]}"
    journal = Journal(work, key, start_over=f"delete {work}")
    try:
        teacher = train_teacher(
            source, config, journal, events, cache=teacher_cache(), device=str(device)
        )
    finally:
        journal.close()
    return OrderedTeacher(teacher, real)
