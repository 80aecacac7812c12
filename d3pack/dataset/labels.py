"""Soft labels: rebuilt from the pack class by class, kept while they are small."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.dataset.order import Ints
from d3pack.errors import UsageError
from d3pack.format import Coded
from d3pack.format.codecs import decode_labels

_KEPT = 256 << 20  # bytes of rebuilt probability vectors


class SoftLabels:
    """Probability vectors over the selected classes, float32, each summing to one."""

    def __init__(self, coded: Coded | None, classes: Ints, total: int) -> None:
        if coded is None:
            raise UsageError(
                "soft_labels=True, but this pack holds no soft labels",
                hint="encode with soft labels, or give teacher=",
            )
        self._coded = coded
        self._classes = classes
        self._whole = np.array_equal(classes, np.arange(total))
        self._rows: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def take(self, classes: Ints, images: Ints) -> Tensor:
        """The vectors of image `images[i]` of the pack's class `classes[i]`."""
        out = np.empty((len(classes), len(self._classes)), dtype=np.float32)
        for number in np.unique(classes).tolist():
            here = classes == number
            out[here] = self._of_class(number)[images[here]]
        return torch.from_numpy(out)

    def _of_class(self, number: int) -> npt.NDArray[np.float32]:
        rows = self._rows.get(number)
        if rows is None:
            rows = decode_labels(self._coded, number)
            if not self._whole:
                rows = self._selected(rows, number)
            self._rows[number] = rows
            while len(self._rows) > max(1, _KEPT // rows.nbytes):
                self._rows.popitem(last=False)
        self._rows.move_to_end(number)
        return rows

    def _selected(self, rows: npt.NDArray[np.float32], number: int) -> npt.NDArray[np.float32]:
        """What was said about the selected classes alone; the own class where nothing was."""
        kept = rows[:, self._classes]
        mass = kept.sum(axis=1, keepdims=True)
        own = (self._classes == number).astype(np.float32)
        return np.where(mass > 0, kept / np.where(mass > 0, mass, 1), own).astype(np.float32)
