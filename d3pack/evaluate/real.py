"""Real images in memory, in the class order of a pack and at the size a student sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d3pack.errors import SourceError
from d3pack.evaluate.training import fit
from d3pack.sources import Source, tidy

_SHOWN = 6


def match_classes(wanted: Sequence[str], found: Sequence[str], what: str) -> tuple[int, ...]:
    """For each wanted class its place among `found`; both lists must hold the same names."""
    places = {name: place for place, name in enumerate(found)}
    if not set(wanted) <= set(places):
        places = {tidy(name).casefold(): place for place, name in enumerate(found)}
        keys = [tidy(name).casefold() for name in wanted]
    else:
        keys = list(wanted)
    missing = [name for name, key in zip(wanted, keys, strict=True) if key not in places]
    taken = {places[key] for key in keys if key in places}
    extra = [name for place, name in enumerate(found) if place not in taken]
    if missing or extra:
        raise SourceError(
            f"the pack has {len(wanted)} classes, the {what} images {len(found)}; "
            f"only in the pack: {_some(missing)}; only in the {what} images: {_some(extra)}",
            code="E_CLASSES",
            hint="give images with the pack's classes, or map folder names with --class-names",
        )
    return tuple(places[key] for key in keys)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def common_size(source: Source) -> int:
    """The side of the images, when all that are looked at agree on one square."""
    seen = set()
    for c in range(len(source.classes)):
        for _, image in source.iter_class(c):
            seen.add(image.size)
            break
    if len(seen) != 1 or len(set(next(iter(seen)))) != 1:
        shown = ", ".join(f"{w}x{h}" for w, h in sorted(seen)[:4]) or "no readable image"
        raise SourceError(
            f"the test images have no common square size ({shown})",
            hint="say at which size to train and test: --size 64",
        )
    return int(next(iter(seen))[0])


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images with a class each."""

    images: Tensor  # uint8 (N, 3, S, S)
    labels: Tensor  # int64 (N,)


class RealImages:
    """The images of a source that are asked for, kept once read."""

    def __init__(self, source: Source, classes: Sequence[str], size: int, what: str) -> None:
        self.source = source
        self.size = size
        self.what = what
        self.order = match_classes(classes, source.classes, what)
        self._kept: dict[tuple[int, int], Tensor | None] = {}

    @property
    def counts(self) -> tuple[int, ...]:
        """Files of each class, in the pack's order."""
        return tuple(self.source.counts[place] for place in self.order)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def get(self, c: int, i: int) -> Tensor | None:
        """Image i of the pack's class c; None when it cannot be read."""
        if (c, i) not in self._kept:
            image = self.source.get(self.order[c], i)
            pixels = None
            if image is not None:
                array = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
                pixels = fit(torch.from_numpy(np.array(array))[None], self.size)[0]
            self._kept[c, i] = pixels
        return self._kept[c, i]

    def draw(self, per_class: int, seed: int) -> Labelled:
        """Random images of each class, class by class; a longer draw begins with a shorter one."""
        images, labels = [], []
        for c, count in enumerate(self.counts):
            order = np.random.Generator(np.random.Philox(key=[seed, c])).permutation(count)
            found = 0
            for i in order:
                pixels = self.get(c, int(i))
                if pixels is not None:
                    images.append(pixels)
                    labels.append(c)
                    found += 1
                if found == per_class:
                    break
            if found == 0:
                raise SourceError(
                    f"no {self.what} image of class {self.source.classes[self.order[c]]!r}"
                    " can be read",
                    hint="check the folder",
                )
        return Labelled(torch.stack(images), torch.tensor(labels))

    def all(self) -> Labelled:
        """Every readable image."""
        return self.draw(max(self.counts), 0)
