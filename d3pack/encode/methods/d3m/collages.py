"""Collages: the most typical patches of a class, tiled, and split into clusters for its modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.sources import Source
from d3pack.teachers import Cut, Teacher, batched, best_patches, collage_order, tile

UNCHOSEN = 100  # collages of a class, at most, of patches that were not chosen


@dataclass(frozen=True, slots=True)
class Collages:
    """The collages of one class, the most typical first."""

    images: Tensor  # uint8 (N, 3, H, W)
    unchosen: Tensor  # a few, of patches as they came
    features: Tensor  # of the teacher, (N, F)
    seen: int  # images that were looked at
    bad: int  # images that could not be read
    realism: float  # mean cross-entropy of the chosen patches


def make_collages(
    source: Source,
    c: int,
    teacher: Teacher,
    cut: Cut,
    factor: int,
    most: int,
    allowed: Sequence[int] | None = None,
) -> Collages:
    """Return the collages of class c, of factor x factor patches each, at most `most`.

    `allowed` are the images to look at, in order; None: all of the class, at random.
    """
    patches = best_patches(source, c, teacher, cut, allowed)
    area = factor**2
    order = np.argsort(patches.costs, kind="stable")
    if len(order) < area:  # too few for one collage: they repeat
        order = np.resize(order, area)
    unchosen = np.sort(order)[: max(1, min(UNCHOSEN, len(order) // area)) * area]
    order = order[collage_order(max(1, min(most, len(order) // area)), factor)]
    images = torch.from_numpy(tile(patches.pixels[order], factor))
    return Collages(
        images,
        torch.from_numpy(tile(patches.pixels[unchosen], factor)),
        batched(teacher, images)[1],
        len(patches.pixels),
        patches.bad,
        round(float(patches.costs[order].mean()), 4),
    )


def clusters(features: Tensor, count: int, seed: int, rounds: int = 20) -> npt.NDArray[np.int64]:
    """Return the group of each row: `count` groups of equal size, by balanced k-means."""
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
    means = np.stack(centres)
    groups = np.full(rows, -1, dtype=np.int64)
    for _ in range(rounds):
        apart = ((points[:, None] - means[None]) ** 2).sum(2)
        regrouped = _balanced(apart)
        if np.array_equal(regrouped, groups):
            break
        groups = regrouped
        means = np.stack([points[groups == g].mean(0) for g in range(count)])
    return groups


def _balanced(apart: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Assign each row to its nearest group with room; rows that lose most by waiting go first."""
    rows, count = apart.shape
    least, spare = divmod(rows, count)
    ranked = np.sort(apart, axis=1)
    groups = np.empty(rows, dtype=np.int64)
    sizes = [0] * count
    for row in np.argsort(ranked[:, 0] - ranked[:, 1], kind="stable"):
        for group in np.argsort(apart[row], kind="stable"):
            if sizes[group] < least or (sizes[group] == least and spare > 0):
                spare -= sizes[group] == least
                sizes[group] += 1
                groups[row] = group
                break
    return groups
