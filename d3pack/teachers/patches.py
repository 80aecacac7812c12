"""Patches of real images that a teacher finds most typical of their class (arXiv 2312.03526)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from d3pack.errors import SourceError
from d3pack.sources import Source, random_order
from d3pack.teachers.teacher import Teacher, zero_of

Box = tuple[float, float, float, float]
BATCH = 256  # trial crops that the teacher sees at a time
_TRIES = 10  # as torchvision draws a crop


@dataclass(frozen=True, slots=True)
class Cut:
    """How patches are cut from images.

    RDED cuts as torchvision's RandomResizedCrop: bilinear squares that show a share of the area of
    the image, not of the largest box of their aspect in it. Its teacher sees them padded.
    """

    size: tuple[int, int]  # of a patch: height, width
    pool: int  # images per class that are looked at
    crops: int = 1  # trial crops per image; the best one is its patch
    scale: tuple[float, float] = (1.0, 1.0)  # share of an image's area that a crop shows
    seed: int = 0
    as_rded: bool = False
    padded: tuple[int, int] | None = None  # what the teacher sees: the patch among zeros


@dataclass(frozen=True, slots=True)
class Patches:
    """One patch per image of a class, in the random order in which images were looked at."""

    pixels: npt.NDArray[np.uint8]  # (N, 3, h, w)
    costs: npt.NDArray[np.float32]  # cross-entropy of each under the teacher
    bad: int  # images that could not be read


def crop_box(
    width: int, height: int, aspect: float, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Return a box of an aspect that shows a random share of the largest such box."""
    full_w, full_h = min(width, height * aspect), min(height, width / aspect)
    side = float(np.sqrt(rng.uniform(*scale)))
    w, h = max(1.0, full_w * side), max(1.0, full_h * side)
    free_x, free_y = max(0.0, width - w), max(0.0, height - h)
    if side >= 1.0:
        x, y = free_x / 2, free_y / 2  # all of it: the middle, no draw
    else:
        x, y = rng.uniform(0, free_x), rng.uniform(0, free_y)
    return x, y, min(x + w, float(width)), min(y + h, float(height))


def resized_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Return a square that shows a random share of the area; the middle one where none fits."""
    for _ in range(_TRIES):
        side = round(float(np.sqrt(width * height * rng.uniform(*scale))))
        if 0 < side <= min(width, height):
            x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
            return x, y, x + side, y + side
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def collage_order(count: int, factor: int) -> npt.NDArray[np.int64]:
    """Return ranks in the order in which `tile` makes `count` collages of them.

    As in RDED, collage i holds the ranks i, n + i, 2n + i, ...: no collage has all of the best.
    """
    return np.arange(count * factor**2).reshape(factor**2, count).T.ravel()


def tile(patches: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Return (N * factor^2, 3, h, w) as (N, 3, h * factor, w * factor), row by row."""
    count = len(patches) // factor**2
    _, channels, height, width = patches.shape
    grid = patches.reshape(count, factor, factor, channels, height, width)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5)).reshape(
        count, channels, factor * height, factor * width
    )


def best_patches(
    source: Source, c: int, teacher: Teacher, cut: Cut, order: Sequence[int] | None = None
) -> Patches:
    """Return for each image of a class the crop with the lowest cross-entropy.

    Args:
        order: images to look at, one after the other; None: all of the class, at random.

    Raises:
        SourceError: if no image of the class can be read.
    """
    if order is None:
        order = random_order(source.counts[c], cut.seed, c)
    patches: list[npt.NDArray[np.uint8]] = []
    costs: list[float] = []
    trials: list[npt.NDArray[np.uint8]] = []
    bad = 0

    def choose() -> None:
        """Keep the best trial of each image."""
        cost = _costs(teacher, _padded(np.stack(trials), cut.padded, zero_of(teacher)), c)
        for start in range(0, len(trials), cut.crops):
            best = start + int(cost[start : start + cut.crops].argmin())
            patches.append(trials[best])
            costs.append(float(cost[best]))
        trials.clear()

    for i in order:
        if len(patches) + len(trials) // cut.crops >= cut.pool:
            break
        image = source.get(c, int(i))
        if image is None:
            bad += 1
            continue
        rng = np.random.Generator(np.random.Philox(key=[cut.seed, 2**32 + c], counter=int(i)))
        trials += [_crop(image, cut, rng) for _ in range(cut.crops)]
        if len(trials) >= BATCH:
            choose()
    if trials:
        choose()
    if not patches:
        raise SourceError(f"no image of class {source.classes[c]!r} can be read")
    return Patches(np.stack(patches), np.asarray(costs, dtype=np.float32), bad)


def _crop(image: Image.Image, cut: Cut, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    height, width = cut.size
    if cut.as_rded:
        box, resample = resized_crop_box(*image.size, cut.scale, rng), Image.Resampling.BILINEAR
    else:
        box = crop_box(*image.size, width / height, cut.scale, rng)
        resample = Image.Resampling.BICUBIC
    patch = image.resize((width, height), resample, box=box)
    return np.asarray(patch, dtype=np.uint8).transpose(2, 0, 1)


def _padded(
    patches: npt.NDArray[np.uint8], size: tuple[int, int] | None, zero: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """Patches in the middle of what a teacher sees as zeros; as they are without a size."""
    if size is None or size == patches.shape[2:]:
        return patches
    height, width = patches.shape[2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    grey = np.asarray(zero, np.uint8)[None, :, None, None]
    framed = np.broadcast_to(grey, (len(patches), 3, *size)).copy()
    framed[:, :, top : top + height, left : left + width] = patches
    return framed


def _costs(teacher: Teacher, images: npt.NDArray[np.uint8], c: int) -> npt.NDArray[np.float32]:
    """Cross-entropy of images with class c."""
    parts = torch.split(torch.from_numpy(images), BATCH)
    logits = torch.cat([teacher.logits(part) for part in parts])
    target = torch.full((len(images),), c)
    return functional.cross_entropy(logits, target, reduction="none").numpy()
