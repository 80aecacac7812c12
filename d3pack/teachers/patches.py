"""Patches of real images that a teacher finds most typical of their class (arXiv 2312.03526)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from d3pack.errors import SourceError
from d3pack.sources import Source
from d3pack.teachers.teacher import Teacher

Box = tuple[float, float, float, float]
BATCH = 256  # trial crops that the teacher sees at a time


@dataclass(frozen=True, slots=True)
class Cut:
    """How patches are cut from images."""

    size: tuple[int, int]  # of a patch: height, width
    pool: int  # images per class that are looked at
    crops: int = 1  # trial crops per image; the best one is its patch
    scale: tuple[float, float] = (1.0, 1.0)  # share of an image's area that a crop shows
    seed: int = 0


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


def best_patches(source: Source, c: int, teacher: Teacher, cut: Cut) -> Patches:
    """Return for each image of a class the crop with the lowest cross-entropy.

    Raises:
        SourceError: if no image of the class can be read.
    """
    order = np.random.Generator(np.random.Philox(key=[cut.seed, c])).permutation(source.counts[c])
    patches: list[npt.NDArray[np.uint8]] = []
    costs: list[float] = []
    trials: list[npt.NDArray[np.uint8]] = []
    bad = 0

    def choose() -> None:
        """Keep the best trial of each image."""
        cost = _costs(teacher, np.stack(trials), c)
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
    box = crop_box(*image.size, width / height, cut.scale, rng)
    patch = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(patch, dtype=np.uint8).transpose(2, 0, 1)


def _costs(teacher: Teacher, images: npt.NDArray[np.uint8], c: int) -> npt.NDArray[np.float32]:
    """Cross-entropy of images with class c."""
    parts = torch.split(torch.from_numpy(images), BATCH)
    logits = torch.cat([teacher.logits(part) for part in parts])
    target = torch.full((len(images),), c)
    return functional.cross_entropy(logits, target, reduction="none").numpy()
