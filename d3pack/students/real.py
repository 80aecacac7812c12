"""Real images in memory, in the class order of a pack and at the size that students see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d3pack.errors import SourceError
from d3pack.sources import Source, random_order, tidy
from d3pack.students.images import LabelledImages
from d3pack.students.protocols import Resample
from d3pack.students.training import fit

_NAMED = 6  # classes that an error lists


def match_classes(pack: Sequence[str], source: Sequence[str], what: str) -> tuple[int, ...]:
    """Return the place in `source` of each class of the pack; both must have the same names.

    `what` is how errors call the real images: "training" or "test".
    """
    places = {name: place for place, name in enumerate(source)}
    keys = list(pack)
    if not set(pack) <= set(places):
        places = {tidy(name).casefold(): place for place, name in enumerate(source)}
        keys = [tidy(name).casefold() for name in pack]
    missing = [name for name, key in zip(pack, keys, strict=True) if key not in places]
    matched = {places[key] for key in keys if key in places}
    extra = [name for place, name in enumerate(source) if place not in matched]
    if missing or extra:
        raise SourceError(
            f"the pack has {len(pack)} classes, the {what} images {len(source)}; "
            f"only in the pack: {_some(missing)}; only in the {what} images: {_some(extra)}",
            code="E_CLASSES",
            hint="give images with the pack's classes, or map folder names with class_names",
        )
    return tuple(places[key] for key in keys)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def common_size(source: Source) -> int:
    """Return the side of the images, where the first readable ones of all classes agree."""
    sizes = set()
    for c in range(len(source.classes)):
        for _, image in source.iter_class(c):
            sizes.add(image.size)
            break
    sides = {side for size in sizes for side in size}
    if len(sides) != 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:4]) or "no readable image"
        raise SourceError(
            f"the test images have no common square size ({listed})",
            hint="choose the size to train and test at, as size=64",
        )
    return int(sides.pop())


class RealImages:
    """The images of a source in the order of a pack's classes, read once and kept."""

    def __init__(
        self,
        source: Source,
        classes: Sequence[str],
        size: int,
        what: str,
        resample: Resample = "bicubic",
    ) -> None:
        self.source = source
        self.classes = tuple(classes)
        self.size = size
        self.resample: Resample = resample
        self.what = what
        self.order = match_classes(classes, source.classes, what)
        self._kept: dict[tuple[int, int], Tensor | None] = {}

    @property
    def counts(self) -> tuple[int, ...]:
        """Files of each class, in the pack's order."""
        return tuple(self.source.counts[place] for place in self.order)

    def fingerprint(self) -> str:
        """Return the identity of the source."""
        return self.source.fingerprint()

    def get(self, c: int, i: int) -> Tensor | None:
        """Return image i of the pack's class c; None where it cannot be read."""
        if (c, i) not in self._kept:
            image = self.source.get(self.order[c], i)
            pixels = None
            if image is not None:
                array = np.array(image, dtype=np.uint8).transpose(2, 0, 1)
                pixels = fit(torch.from_numpy(array)[None], self.size, resample=self.resample)[0]
            self._kept[c, i] = pixels
        return self._kept[c, i]

    def take(self, c: int, numbers: Sequence[int]) -> Tensor:
        """Return those of these images of the pack's class c that can be read."""
        images = [self.get(c, i) for i in numbers]
        none = torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        return torch.cat([none, *(image[None] for image in images if image is not None)])

    def permutation(self, c: int, seed: int) -> list[int]:
        """Return the numbers of the images of the pack's class c, in the order of a draw."""
        return random_order(self.counts[c], seed, c)

    def draw(self, per_class: int, seed: int) -> LabelledImages:
        """Return random images of each class, class by class.

        A longer draw of the same seed begins with the shorter one.
        """
        images: list[Tensor] = []
        labels: list[int] = []
        for c in range(len(self.classes)):
            before = len(images)
            for i in self.permutation(c, seed):
                pixels = self.get(c, i)
                if pixels is not None:
                    images.append(pixels)
                    labels.append(c)
                if len(images) - before == per_class:
                    break
            if len(images) == before:
                raise SourceError(
                    f"no {self.what} image of class {self.source.classes[self.order[c]]!r}"
                    " can be read",
                    hint="check the folder",
                )
        return LabelledImages(torch.stack(images), torch.tensor(labels))

    def by_class(self, per_class: int, seed: int) -> list[Tensor]:
        """Return the images of `draw`, as one tensor for each class."""
        drawn = self.draw(per_class, seed)
        return [drawn.images[drawn.labels == c] for c in range(len(self.classes))]

    def all(self) -> LabelledImages:
        """Return every readable image."""
        return self.draw(max(self.counts), 0)
