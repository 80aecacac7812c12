"""Collages: the patches of a class that its teacher finds most real, tiled (arXiv 2312.03526)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from d3pack.errors import SourceError
from d3pack.sources import Source
from d3pack.teachers import Teacher, batched

Box = tuple[float, float, float, float]
USUAL = 100  # collages of a class, at most, of patches that nobody chose


@dataclass(frozen=True, slots=True)
class CollageOptions:
    """How patches are cut and chosen."""

    size: tuple[int, int]  # of a collage: height, width
    factor: int  # factor x factor patches
    pool: int  # images a class that are looked at
    crops: int  # trial crops an image; the best one is its patch
    scale: tuple[float, float]  # share of an image's area that a crop shows
    count: int  # collages a class, at most
    seed: int


@dataclass(frozen=True, slots=True)
class Collages:
    """The collages of one class, the most real first."""

    images: Tensor  # uint8 (N, 3, H, W)
    usual: Tensor  # a few, of patches as they came: nobody chose them
    features: Tensor  # of the teacher, (N, F)
    seen: int  # images that were looked at
    bad: int  # images that could not be read
    realism: float  # mean cross-entropy of the chosen patches


def crop_box(
    width: int, height: int, aspect: float, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of the collage's aspect that shows a random share of the largest such box."""
    full_w, full_h = min(width, height * aspect), min(height, width / aspect)
    side = float(np.sqrt(rng.uniform(*scale)))
    w, h = max(1.0, full_w * side), max(1.0, full_h * side)
    free_x, free_y = max(0.0, width - w), max(0.0, height - h)
    if side >= 1.0:
        x, y = free_x / 2, free_y / 2  # all of it: the middle, no draw
    else:
        x, y = rng.uniform(0, free_x), rng.uniform(0, free_y)
    return x, y, min(x + w, float(width)), min(y + h, float(height))


def best_patches(
    source: Source, c: int, teacher: Teacher, options: CollageOptions
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
    """One patch an image: the crop of the lowest cross-entropy. (patches, entropies, bad files)"""
    height, width = options.size[0] // options.factor, options.size[1] // options.factor
    order = np.random.Generator(np.random.Philox(key=[options.seed, c])).permutation(
        source.counts[c]
    )
    patches: list[npt.NDArray[np.uint8]] = []
    costs: list[float] = []
    waiting: list[npt.NDArray[np.uint8]] = []
    bad = 0

    def judge() -> None:
        trials = np.stack(waiting)
        target = torch.full((len(trials),), c)
        logits = torch.cat(
            [teacher.logits(part) for part in torch.split(torch.from_numpy(trials), 256)]
        )
        cost = functional.cross_entropy(logits, target, reduction="none").numpy()
        for start in range(0, len(trials), options.crops):
            best = start + int(cost[start : start + options.crops].argmin())
            patches.append(trials[best])
            costs.append(float(cost[best]))
        waiting.clear()

    for i in order:
        if len(patches) + len(waiting) // options.crops >= options.pool:
            break
        image = source.get(c, int(i))
        if image is None:
            bad += 1
            continue
        rng = np.random.Generator(np.random.Philox(key=[options.seed, 2**32 + c], counter=int(i)))
        for _ in range(options.crops):
            box = crop_box(*image.size, width / height, options.scale, rng)
            patch = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
            waiting.append(np.asarray(patch, dtype=np.uint8).transpose(2, 0, 1))
        if len(waiting) >= 256:
            judge()
    if waiting:
        judge()
    if not patches:
        raise SourceError(f"no image of class {source.classes[c]!r} can be read")
    return np.stack(patches), np.asarray(costs, dtype=np.float32), bad


def tile(patches: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """(N * factor^2, 3, h, w) -> (N, 3, h * factor, w * factor), row by row."""
    count = len(patches) // factor**2
    _, channels, height, width = patches.shape
    grid = patches.reshape(count, factor, factor, channels, height, width)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5)).reshape(
        count, channels, factor * height, factor * width
    )


def make_collages(source: Source, c: int, teacher: Teacher, options: CollageOptions) -> Collages:
    """The collages of class c."""
    patches, costs, bad = best_patches(source, c, teacher, options)
    seen = len(patches)
    area = options.factor**2
    order = np.argsort(costs, kind="stable")
    if seen < area:  # too few for one collage: they repeat
        order = np.resize(order, area)
    usual = np.sort(order)[: max(1, min(USUAL, len(order) // area)) * area]
    order = order[: max(1, min(options.count, len(order) // area)) * area]
    images = torch.from_numpy(tile(patches[order], options.factor))
    return Collages(
        images,
        torch.from_numpy(tile(patches[usual], options.factor)),
        batched(teacher, images)[1],
        seen,
        bad,
        round(float(costs[order].mean()), 4),
    )


def clusters(features: Tensor, count: int, seed: int, rounds: int = 20) -> npt.NDArray[np.int64]:
    """Split rows into `count` groups of equal size that lie close together (balanced k-means)."""
    rows = len(features)
    if count == 1:
        return np.zeros(rows, dtype=np.int64)
    if rows < count:
        return np.arange(rows, dtype=np.int64)
    points = features.numpy().astype(np.float64)
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**33]))
    centres = [points[int(rng.integers(rows))]]
    while len(centres) < count:  # the farthest point from all centres so far
        apart = np.min([((points - centre) ** 2).sum(1) for centre in centres], axis=0)
        centres.append(points[int(apart.argmax())])
    middle = np.stack(centres)
    found = np.full(rows, -1, dtype=np.int64)
    for _ in range(rounds):
        apart = ((points[:, None] - middle[None]) ** 2).sum(2)
        fresh = _balanced(apart)
        if np.array_equal(fresh, found):
            break
        found = fresh
        middle = np.stack([points[found == g].mean(0) for g in range(count)])
    return found


def _balanced(apart: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Each row to its nearest group with room; rows that lose most by waiting choose first."""
    rows, count = apart.shape
    least, spare = divmod(rows, count)
    ranked = np.sort(apart, axis=1)
    found = np.empty(rows, dtype=np.int64)
    sizes = [0] * count
    for row in np.argsort(ranked[:, 0] - ranked[:, 1], kind="stable"):
        for group in np.argsort(apart[row], kind="stable"):
            if sizes[group] < least or (sizes[group] == least and spare > 0):
                spare -= sizes[group] == least
                sizes[group] += 1
                found[row] = group
                break
    return found
