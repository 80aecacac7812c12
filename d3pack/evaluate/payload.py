"""How many real images fit into so many bytes: the baseline that a pack has to beat.

The images of all classes lie in one picture, tile by tile: tables and headers are paid once, which
is far below the size of separate files, and labels cost nothing because the order tells them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d3pack.evaluate.real import Labelled
from d3pack.evaluate.training import fit

Form = Literal["JPEG", "WEBP"]
FORMS: tuple[Form, ...] = ("JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Squeeze:
    """One trade-off: how small and how coarse the tiles are."""

    form: Form
    quality: int
    side: int

    def __str__(self) -> str:
        return f"{self.form} q{self.quality} {self.side} px"


def candidates(form: Form, size: int) -> list[Squeeze]:
    """The trade-offs that are tried: three qualities, and two smaller sizes at the middle one."""
    low, middle, high = (10, 25, 60) if form == "JPEG" else (5, 20, 60)
    sides = sorted({max(8, size * 3 // 4 // 8 * 8), max(8, size // 2 // 8 * 8)} - {size})
    full = [Squeeze(form, quality, size) for quality in (low, middle, high)]
    return full + [Squeeze(form, middle, side) for side in sides]


def _save(picture: Image.Image, squeeze: Squeeze) -> bytes:
    buffer = io.BytesIO()
    if squeeze.form == "JPEG":
        picture.save(buffer, "JPEG", quality=squeeze.quality, optimize=True, progressive=True)
    else:
        picture.save(buffer, "WEBP", quality=squeeze.quality, method=6)
    return buffer.getvalue()


def pack_tiles(images: Tensor, squeeze: Squeeze) -> bytes:
    """All images (N, 3, S, S) as one picture."""
    tiles = fit(images, squeeze.side).permute(0, 2, 3, 1).numpy()
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    side = squeeze.side
    sheet = np.zeros((rows * columns, side, side, 3), dtype=np.uint8)
    sheet[: len(tiles)] = tiles
    sheet[len(tiles) :] = tiles[-1]  # a repeated tile costs least
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return _save(Image.fromarray(sheet.reshape(rows * side, columns * side, 3)), squeeze)


def unpack_tiles(data: bytes, count: int, side: int) -> Tensor:
    """The tiles as they come out of the file, uint8 (N, 3, side, side)."""
    with Image.open(io.BytesIO(data)) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    flat = tiles.reshape(rows * columns, side, side, 3)[:count].transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(flat))


def file_bytes(images: Tensor, squeeze: Squeeze) -> float:
    """Mean size of one image in a file of its own: what a folder of images costs."""
    tiles = fit(images, squeeze.side).permute(0, 2, 3, 1).numpy()
    return float(np.mean([len(_save(Image.fromarray(tile), squeeze)) for tile in tiles]))


@dataclass(frozen=True, slots=True)
class Payload:
    """Real images that fit into a budget, as a student gets them."""

    squeeze: Squeeze
    per_class: int
    nbytes: int
    content: Labelled


def largest(
    classes: Sequence[Tensor], squeeze: Squeeze, budget: int, *, start: int = 1
) -> Payload | None:
    """As many images of each class as fit into `budget` bytes; None when not even one does.

    `classes` holds the images of each class in the order in which they are wanted.
    """
    limit = min(len(images) for images in classes)

    def take(count: int) -> Tensor:
        return torch.cat([images[:count] for images in classes])

    def packed(count: int) -> bytes:
        return pack_tiles(take(count), squeeze)

    low, high, best = 0, limit + 1, b""
    guess = min(max(start, 1), limit)
    while high - low > 1:
        data = packed(guess)
        if len(data) <= budget:
            low, best = guess, data
        else:
            high = guess
        # Sizes grow almost in proportion: aim there, inside what is left.
        guess = min(max(round(guess * budget / len(data)), low + 1), high - 1)
    if low == 0:
        return None
    labels = torch.arange(len(classes)).repeat_interleave(low)
    tiles = unpack_tiles(best, low * len(classes), squeeze.side)
    return Payload(squeeze, low, len(best), Labelled(tiles, labels))
