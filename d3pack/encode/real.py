"""Real images as a method wants them: their centre cropped to one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d3pack.errors import SourceError
from d3pack.sources import Source

_BATCH = 32


def readable_images(source: Source, c: int, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Yield images of a class, without those that cannot be read.

    Raises:
        SourceError: none can be read.
    """
    any_read = False
    for i in numbers:
        image = source.get(c, i)
        if image is not None:
            any_read = True
            yield image
    if not any_read:
        raise SourceError(f"no image of class {source.classes[c]!r} can be read")


def fitted_images(
    source: Source, c: int, numbers: Sequence[int], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield images of a class in batches, without those that cannot be read.

    Raises:
        SourceError: none can be read.
    """
    height, width = size
    images = readable_images(source, c, numbers)
    while batch := list(islice(images, _BATCH)):
        yield torch.stack(
            [
                pixels_of(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
                for image in batch
            ]
        )


def pixels_of(image: Image.Image) -> Tensor:
    """Return an image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))
