"""Real images as a method wants them: their centre cropped to one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d3pack.errors import SourceError
from d3pack.sources import Source

_BATCH = 32


def fitted_images(
    source: Source, c: int, numbers: Sequence[int], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield images of a class in batches, without those that cannot be read.

    Raises:
        SourceError: none can be read.
    """
    height, width = size
    pixels: list[Tensor] = []
    seen = 0
    for i in numbers:
        image = source.get(c, i)
        if image is not None:
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            pixels.append(torch.from_numpy(np.array(fitted).transpose(2, 0, 1)))
            seen += 1
        if len(pixels) == _BATCH:
            yield torch.stack(pixels)
            pixels = []
    if not seen:
        raise SourceError(f"no image of class {source.classes[c]!r} can be read")
    if pixels:
        yield torch.stack(pixels)
