"""Clusters of the real images of a class, in the latents of a backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d3pack.backbones import Backbone
from d3pack.encode.codes import latents_of
from d3pack.encode.real import fitted_images
from d3pack.sources import Source

_ROUNDS = 300  # of k-means, at most


@dataclass(frozen=True, slots=True)
class Clusters:
    """Clusters of latents, the largest first."""

    centres: Tensor  # (K, C, H, W)
    counts: tuple[int, ...]  # latents of each


def real_latents(
    source: Source, c: int, numbers: Sequence[int], size: tuple[int, int], backbone: Backbone
) -> Tensor:
    """Return the latents of images of a class, on the CPU, without those that cannot be read.

    Raises:
        SourceError: none can be read.
    """
    batches = fitted_images(source, c, numbers, size)
    return torch.cat([latents_of(backbone, pixels).cpu() for pixels in batches])


def cluster(latents: Tensor, count: int, seed: int) -> Clusters:
    """Return at most `count` clusters of latents (N, C, H, W), by k-means.

    There are fewer where fewer latents differ.
    """
    mean = latents.mean(0)
    rows = (latents - mean).flatten(1)  # products of small numbers lose less
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**33 + 1]))
    centres = first_centres(rows, count, rng, trials=2 + int(math.log(count)))
    groups = torch.full((len(rows),), -1)
    for _ in range(_ROUNDS):
        moved = _apart(rows, centres).argmin(1)
        if torch.equal(moved, groups):
            break
        groups = moved
        centres = _means(rows, groups, centres)
        _relocate(rows, groups, centres)
    counts = torch.bincount(groups, minlength=len(centres))
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    shaped = centres[order].reshape(-1, *latents.shape[1:]) + mean
    return Clusters(shaped, tuple(counts[order].tolist()))


def first_centres(rows: Tensor, count: int, rng: np.random.Generator, *, trials: int) -> Tensor:
    """Return rows to begin with, by greedy k-means++, as scikit-learn has it.

    After the first, each is the best of some rows that are drawn by their squared distance to those
    before: the one that leaves all rows nearest.
    """
    chosen = [int(rng.integers(len(rows)))]
    nearest = _distances(rows, chosen[0])
    while len(chosen) < min(count, len(rows)) and nearest.max() > 0:
        total = nearest.cumsum(0)
        drawn = torch.from_numpy(rng.random(trials)) * total[-1]
        places = torch.searchsorted(total, drawn, right=True).clamp(max=len(rows) - 1).tolist()
        left = [torch.minimum(nearest, _distances(rows, place)) for place in places]
        best = int(torch.stack([distances.sum() for distances in left]).argmin())
        chosen.append(places[best])
        nearest = left[best]
    return rows[chosen]


def _distances(rows: Tensor, place: int) -> Tensor:
    """Return squared distances to one of the rows."""
    return (rows - rows[place]).square().sum(1).double()


def _apart(rows: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances, less a term that all centres share."""
    return centres.square().sum(1) - 2 * (rows @ centres.T)


def _relocate(rows: Tensor, groups: Tensor, centres: Tensor) -> None:
    """Move the centres of empty groups to the rows that lie farthest from their own, in place."""
    empty = torch.nonzero(torch.bincount(groups, minlength=len(centres)) == 0)[:, 0]
    if not len(empty):
        return
    apart = (rows - centres[groups]).square().sum(1)
    farthest = apart.argsort(descending=True, stable=True)[: len(empty)]
    centres[empty] = rows[farthest]


def _means(rows: Tensor, groups: Tensor, centres: Tensor) -> Tensor:
    """Return the mean of each group; an empty one keeps its centre."""
    counts = torch.bincount(groups, minlength=len(centres))
    sums = torch.zeros_like(centres).index_add_(0, groups, rows)
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, means, centres)
