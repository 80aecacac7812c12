"""Where decoded images are kept: in memory (the host's or the GPU's), or only the latest few."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.dataset.order import Ints

Shape = tuple[int, int, int]


class Store(Protocol):
    """Images by number. What was written may be gone again; what is not missing can be read."""

    def missing(self, numbers: Ints) -> Ints:
        """Those of the numbers that are not here, or no longer sound."""
        ...

    def write(self, numbers: Ints, images: Tensor) -> None: ...

    def read(self, numbers: Ints) -> Tensor: ...

    def wanted(self, count: int, but: Ints) -> Ints:
        """Up to `count` images worth decoding in slots that would else be padding."""
        ...

    def ready(self) -> int:
        """How many images are here."""
        ...

    def close(self) -> None: ...


def next_absent(absent: npt.NDArray[np.bool_], count: int, but: Ints) -> Ints:
    """The first absent numbers after those in `but`, going round."""
    if count <= 0:
        return np.empty(0, np.int64)
    start = int(but.max()) + 1
    found = np.flatnonzero(absent)
    found = np.concatenate([found[found >= start], found[found < start]])
    return found[~np.isin(found, but)][:count]


class MemoryStore:
    """All images as one uint8 tensor on a device."""

    def __init__(self, images: int, shape: Shape, device: torch.device) -> None:
        self._images = torch.empty((images, *shape), dtype=torch.uint8, device=device)
        self._have = np.zeros(images, dtype=np.bool_)

    def missing(self, numbers: Ints) -> Ints:
        return numbers[~self._have[numbers]]

    def write(self, numbers: Ints, images: Tensor) -> None:
        where = torch.from_numpy(numbers).to(self._images.device)
        self._images.index_copy_(0, where, images.to(self._images.device))
        self._have[numbers] = True

    def read(self, numbers: Ints) -> Tensor:
        if self._images.device.type == "cpu":
            # One thread and a plain copy of rows: torch's indexing is several times slower here.
            return torch.from_numpy(self._images.numpy().take(numbers, axis=0))
        where = torch.from_numpy(numbers).to(self._images.device, non_blocking=True)
        return self._images.index_select(0, where)

    def wanted(self, count: int, but: Ints) -> Ints:
        return next_absent(~self._have, count, but)

    def ready(self) -> int:
        return int(np.count_nonzero(self._have))

    def close(self) -> None:
        self._images = torch.empty(0, dtype=torch.uint8)


class RecentStore:
    """The latest images alone: what is left of a store when nothing is to be kept."""

    def __init__(self, images: int, capacity: int) -> None:
        self._total = images
        self._capacity = capacity
        self._images: OrderedDict[int, Tensor] = OrderedDict()

    def missing(self, numbers: Ints) -> Ints:
        return np.array([n for n in numbers.tolist() if n not in self._images], dtype=np.int64)

    def write(self, numbers: Ints, images: Tensor) -> None:
        for number, image in zip(numbers.tolist(), images, strict=True):
            self._images[number] = image.clone()  # a view would keep its whole batch alive
            self._images.move_to_end(number)
        while len(self._images) > self._capacity:
            self._images.popitem(last=False)

    def read(self, numbers: Ints) -> Tensor:
        return torch.stack([self._images[number] for number in numbers.tolist()])

    def wanted(self, count: int, but: Ints) -> Ints:
        """The images that follow: one who asks singly, in order, then pays for each group once."""
        last = int(but.max())
        following = np.arange(last + 1, min(last + 1 + count, self._total), dtype=np.int64)
        return self.missing(following)

    def ready(self) -> int:
        return len(self._images)

    def close(self) -> None:
        self._images.clear()


class TieredStore:
    """A fast store in front of a shared one: read from the first, kept by both."""

    def __init__(self, front: Store, back: Store) -> None:
        self._front = front
        self._back = back

    def missing(self, numbers: Ints) -> Ints:
        absent = self._front.missing(numbers)
        if not absent.size:
            return absent
        missing = self._back.missing(absent)
        kept = np.setdiff1d(absent, missing)
        if kept.size:
            self._front.write(kept, self._back.read(kept))
        return missing

    def write(self, numbers: Ints, images: Tensor) -> None:
        self._front.write(numbers, images)
        self._back.write(numbers, images)

    def read(self, numbers: Ints) -> Tensor:
        return self._front.read(numbers)

    def wanted(self, count: int, but: Ints) -> Ints:
        return self._front.missing(self._back.wanted(count, but))

    def ready(self) -> int:
        return max(self._front.ready(), self._back.ready())

    def close(self) -> None:
        self._front.close()
        self._back.close()
