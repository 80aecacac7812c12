"""How many real images fit into so many bytes: the baseline that a pack has to beat.

Two layouts. `files`: one file an image, as datasets travel. `sheet`: all images as tiles of one
picture, whose tables and headers are paid once; nobody ships a dataset so, but it holds far more
real images in as many bytes. Labels cost nothing in either: the order tells them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d3pack.evaluate.real import Labelled
from d3pack.evaluate.training import fit

Form = Literal["JPEG", "WEBP", "AVIF"]
Layout = Literal["files", "sheet"]
_WIDEST = 8192  # pixels of a sheet's side: WebP and Pillow's guard against bombs both allow it
SMALLEST = {"files": 40, "sheet": 8}  # bytes below which no image gets


@dataclass(frozen=True, slots=True)
class Squeeze:
    """One trade-off: how small and how coarse the tiles are."""

    form: Form
    layout: Layout
    quality: int
    side: int

    def __str__(self) -> str:
        return f"{self.form} {self.layout} q{self.quality} {self.side} px"


def candidates(form: Form, layout: Layout, size: int) -> list[Squeeze]:
    """The trade-offs that are tried: three qualities, and two smaller sizes at the middle one."""
    low, middle, high = {"JPEG": (10, 25, 60), "WEBP": (5, 20, 60), "AVIF": (10, 25, 60)}[form]
    sides = sorted({max(8, size * 3 // 4 // 8 * 8), max(8, size // 2 // 8 * 8)} - {size})
    full = [Squeeze(form, layout, quality, size) for quality in (low, middle, high)]
    return full + [Squeeze(form, layout, middle, side) for side in sides]


def _save(picture: Image.Image, squeeze: Squeeze) -> bytes:
    if squeeze.form == "JPEG":  # progressive scans pay for large pictures only
        settings: list[dict[str, Any]] = [{"progressive": False}, {"progressive": True}]
        settings = [{"quality": squeeze.quality, "optimize": True, **more} for more in settings]
    elif squeeze.form == "AVIF":
        settings = [{"quality": squeeze.quality, "speed": 4}]
    else:
        settings = [{"quality": squeeze.quality, "method": 6}]
    found = []
    for chosen in settings:
        buffer = io.BytesIO()
        picture.save(buffer, squeeze.form, **chosen)
        found.append(buffer.getvalue())
    return min(found, key=len)


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


def as_files(images: Tensor, squeeze: Squeeze) -> Iterator[bytes]:
    """Each image (N, 3, S, S) as a file of its own."""
    for image in images:
        tile = fit(image[None], squeeze.side)[0].permute(1, 2, 0).numpy()
        yield _save(Image.fromarray(tile), squeeze)


def file_bytes(images: Tensor, squeeze: Squeeze) -> float:
    """Mean size of one image in a file of its own: what a folder of images costs."""
    return float(np.mean([len(data) for data in as_files(images, squeeze)]))


@dataclass(frozen=True, slots=True)
class Payload:
    """Real images that fit into a budget, as a student gets them."""

    squeeze: Squeeze
    nbytes: int
    content: Labelled

    def __str__(self) -> str:
        return f"{len(self.content.images)} images, {self.squeeze}"


def largest(classes: Sequence[Tensor], squeeze: Squeeze, budget: int) -> Payload | None:
    """As many images as fit into `budget` bytes, the classes in turn; None when not even one does.

    `classes` holds the images of each class in the order in which they are wanted.
    """
    depth = max(len(images) for images in classes)
    turns = [(c, i) for i in range(depth) for c in range(len(classes)) if i < len(classes[c])]
    images = torch.stack([classes[c][i] for c, i in turns])
    labels = torch.tensor([c for c, _ in turns])
    if squeeze.layout == "files":
        tiles, nbytes = _first_files(images, squeeze, budget)
    else:
        tiles, nbytes = _first_tiles(images, squeeze, budget)
    if len(tiles) == 0:
        return None
    return Payload(squeeze, nbytes, Labelled(tiles, labels[: len(tiles)]))


def _first_files(images: Tensor, squeeze: Squeeze, budget: int) -> tuple[Tensor, int]:
    kept, spent = [], 0
    for data in as_files(images, squeeze):
        if spent + len(data) > budget:
            break
        spent += len(data)
        kept.append(unpack_tiles(data, 1, squeeze.side)[0])
    return (torch.stack(kept) if kept else images[:0]), spent


def _first_tiles(images: Tensor, squeeze: Squeeze, budget: int) -> tuple[Tensor, int]:
    low, high, best = 0, min(len(images), (_WIDEST // squeeze.side) ** 2) + 1, b""
    guess = 1
    while high - low > 1:
        data = pack_tiles(images[:guess], squeeze)
        if len(data) <= budget:
            low, best = guess, data
        else:
            high = guess
        # Sizes grow almost in proportion: aim there, inside what is left.
        guess = min(max(round(guess * budget / len(data)), low + 1), high - 1)
    return (unpack_tiles(best, low, squeeze.side) if low else images[:0]), len(best)
