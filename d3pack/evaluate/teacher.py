"""The teacher of an evaluation: chooses collages, and labels where a protocol asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from d3pack.evaluate.entries import Choice
from d3pack.evaluate.turns import turn
from d3pack.students import RealImages
from d3pack.system import Events, Journal, SharedFolder, replace_file
from d3pack.teachers import (
    SAMPLES,
    Cut,
    Teacher,
    TransformersTeacher,
    best_patches,
    cache_or_work,
    collage_order,
    teacher_cache,
    teacher_config,
    teacher_key,
    tile,
    train_teacher,
)

POOL = 300  # images of each class that are looked at, as RDED does


@dataclass(frozen=True, slots=True)
class OrderedTeacher:
    """A teacher that answers in the class order of a pack, not of its source."""

    teacher: Teacher
    real: RealImages
    _patches: dict[Hashable, list[Tensor]] = field(default_factory=dict)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits of uint8 images, in the pack's class order."""
        return self.teacher.logits(images)[:, list(self.real.order)]

    @property
    def identity(self) -> str:
        """Hash of the weights."""
        return str(self.teacher.record.get("sha256", self.teacher.record))

    def patches(self, choice: Choice, per_class: int, skip: Sequence[int] = ()) -> list[Tensor]:
        """Return for each class of the pack what is most typical of it, best first.

        Args:
            choice: how to choose.
            per_class: images of each class, at most.
            skip: of each class, how many images of the draw of seed 0 to leave out.
        """
        key = (choice, per_class, tuple(skip))
        if key not in self._patches:
            orders = [self.real.permutation(c, 0)[n:] for c, n in enumerate(skip)]
            self._patches[key] = [
                self._best(choice, per_class, place, orders[c] if skip else None)
                for c, place in enumerate(self.real.order)
            ]
        return self._patches[key]

    def _best(
        self, choice: Choice, per_class: int, place: int, order: Sequence[int] | None
    ) -> Tensor:
        size, factor = self.real.size, choice.factor(self.real.size)
        cut = Cut(
            size=(size // factor, size // factor),
            pool=max(per_class * factor**2, POOL),
            crops=choice.crops,
            scale=choice.scale,
            as_rded=choice.crops > 1,
            padded=(size, size),
        )
        patches = best_patches(self.real.source, place, self.teacher, cut, order)
        ranks = np.argsort(patches.costs, kind="stable")
        ranks = np.resize(ranks, max(len(ranks), factor**2))  # too few for a collage: they repeat
        count = min(per_class, len(ranks) // factor**2)
        chosen = patches.pixels[ranks[collage_order(count, factor)]]
        return torch.from_numpy(tile(chosen, factor))


def open_teacher(
    name: str, real: RealImages, shared: SharedFolder, device: torch.device, events: Events
) -> OrderedTeacher:
    """Open a transformers classifier, or train the small network that encode trains ("train").

    `shared` keeps a training that was interrupted, and the teacher: all processes that share it
    have the same one, even where machines would train others.
    """
    source = real.source
    if name != "train":
        return OrderedTeacher(TransformersTeacher(name, source.classes, device=str(device)), real)
    config = teacher_config(real.size, SAMPLES, 0, str(device))
    key = {"source": source.fingerprint(), "config": asdict(config)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    work = shared.local / f"teacher-{digest[:12]}"
    kept = work / "teacher.safetensors"
    with turn(shared, work, "teacher", events):
        journal = Journal(work, key, start_over=f"delete {work}")
        train = partial(train_teacher, source, config, journal, events, device=str(device))
        try:
            if kept.exists():
                teacher = train(cache=work, key=kept.stem)
            else:
                trained = teacher_key(source, config, str(device))
                cache = cache_or_work(teacher_cache(), journal, events, [trained])
                teacher = train(cache=cache)
                name = f"{trained}.safetensors"
                with suppress(FileNotFoundError):  # the cache was emptied meanwhile
                    replace_file(kept, (cache / name).read_bytes())
        finally:
            journal.close()
    return OrderedTeacher(teacher, real)
