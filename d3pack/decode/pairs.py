"""Many images as numbers: a sequence of (class, index) pairs that holds none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

Pair = tuple[int, int]  # class, index within the class


class Pairs(Sequence[Pair]):
    """The first images of classes, class after class, or some of them.

    Args:
        classes: their numbers.
        per_class: images of each class.
    """

    def __init__(self, classes: Sequence[int], per_class: int) -> None:
        self.classes, self.per_class = classes, per_class
        self._numbers: Any = range(len(classes) * per_class)

    def some(self, numbers: Any) -> Pairs:
        """Return those at positions in the sequence of all; a range or an array of them."""
        chosen = Pairs(self.classes, self.per_class)
        chosen._numbers = numbers
        return chosen

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Pair: ...

    @overload
    def __getitem__(self, at: slice) -> Pairs: ...

    def __getitem__(self, at: int | slice) -> Pair | Pairs:
        chosen = self._numbers[at]
        return self.some(chosen) if isinstance(at, slice) else self._at(chosen)

    def __iter__(self) -> Iterator[Pair]:
        return map(self._at, self._numbers)

    def _at(self, number: int) -> Pair:
        place, index = divmod(int(number), self.per_class)
        return self.classes[place], index
