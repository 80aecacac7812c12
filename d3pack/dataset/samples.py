"""From stored images to what a training loop sees: output format, transforms, soft labels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from d3pack.dataset.order import Ints
from d3pack.errors import D3MError, UsageError
from d3pack.format import Coded
from d3pack.format.codecs import decode_labels

Transform = Callable[[Any], Any]
Output = Literal["uint8", "float", "pil"]
OUTPUTS: tuple[Output, ...] = ("uint8", "float", "pil")

_LABEL_BYTES = 256 << 20  # of probability vectors that are kept


class TransformError(D3MError):
    """A transform raised an exception or returned something else; the message names the image."""

    code = "E_TRANSFORM"


def as_output(images: Tensor, output: Output) -> Tensor:
    """Return NCHW uint8 images as batch transforms are given them: uint8, or float in [0, 1]."""
    return images.to(torch.float32).div_(255) if output == "float" else images


def as_pil(image: Tensor) -> Image.Image:
    """Return one CHW uint8 tensor as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def apply_one(transform: Transform, image: Any, index: int, class_name: str) -> Any:
    """Apply a transform to one image."""
    try:
        return transform(image)
    except Exception as error:
        raise TransformError(
            f"transform failed on image {index} (class {class_name!r}): "
            f"{type(error).__name__}: {error}",
            hint="call it on ds[i] of a dataset without transform to see the input",
        ) from error


def apply_batch(transform: Transform, images: Tensor, indices: list[int], first: str) -> Any:
    """Apply a transform to a batch, whose first image is of class `first`."""
    batch = f"images {indices[0]}..{indices[-1]} ({len(indices)}, class {first!r} first)"
    try:
        result = transform(images)
    except Exception as error:
        raise TransformError(
            f"batch_transform failed on {batch}: {type(error).__name__}: {error}",
            hint="its argument is a whole NCHW batch; a transform of single images is transform=",
        ) from error
    if not hasattr(result, "__len__") or len(result) != len(indices):
        got = f"{len(result)} rows" if hasattr(result, "__len__") else type(result).__name__
        raise TransformError(
            f"batch_transform returned {got} for {batch}",
            hint="a batch transform returns one row for each image",
        )
    return result


class SoftLabels:
    """Probability vectors over the selected classes, float32, each with the sum 1.

    They are decoded class by class, and kept while they are small.
    """

    def __init__(self, coded: Coded | None, classes: Ints, total: int) -> None:
        """Prepare the labels of a pack of `total` classes for those that are selected."""
        if coded is None:
            raise UsageError(
                "soft_labels=True, but this pack holds no soft labels",
                hint="encode with soft labels, or give teacher=",
            )
        self._coded = coded
        self._classes = classes
        self._all_classes = np.array_equal(classes, np.arange(total))
        self._rows: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def take(self, classes: Ints, images: Ints) -> Tensor:
        """Return the vectors of image `images[i]` of the pack's class `classes[i]`."""
        out = np.empty((len(classes), len(self._classes)), dtype=np.float32)
        for number in np.unique(classes).tolist():
            rows = classes == number
            out[rows] = self._of_class(number)[images[rows]]
        return torch.from_numpy(out)

    def _of_class(self, number: int) -> npt.NDArray[np.float32]:
        rows = self._rows.get(number)
        if rows is None:
            rows = decode_labels(self._coded, number)
            if not self._all_classes:
                rows = self._selected(rows, number)
            self._rows[number] = rows
            while len(self._rows) > max(1, _LABEL_BYTES // rows.nbytes):
                self._rows.popitem(last=False)
        self._rows.move_to_end(number)
        return rows

    def _selected(self, rows: npt.NDArray[np.float32], number: int) -> npt.NDArray[np.float32]:
        """Return the vectors over the selected classes; certain of the own class if all are 0."""
        chosen = rows[:, self._classes]
        mass = chosen.sum(axis=1, keepdims=True)
        own = (self._classes == number).astype(np.float32)
        return np.where(mass > 0, chosen / np.where(mass > 0, mass, 1), own).astype(np.float32)
