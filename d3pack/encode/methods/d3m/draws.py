"""What a row looks at: latents, noise levels and noise of its steps, of its judge and of the pilot.

Everything drawn depends on the row, the number of the draw and the density of timesteps alone, so a
run that goes on after a stop sees what it would have seen, whoever shares its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone
from d3pack.decode import noise
from d3pack.encode.methods.d3m.density import BINS, Density
from d3pack.encode.methods.d3m.expected import expected_target

Array = npt.NDArray[Any]
Latents = Callable[
    [int], Array
]  # row -> (N, C, H, W), held in memory only while the row is in a slot

HELD = 0.2  # share of a row's latents that only judge
# noise words apart from those of the pack's own images
STEP_DRAW, JUDGE_DRAW, PILOT_DRAW = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Samples:
    """Noised latents, what the backbone should say there, and what each counts."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    weights: Array

    def __len__(self) -> int:
        return len(self.t)

    @property
    def values(self) -> int:
        """In which a sample is compared."""
        return self.target[0].numel()

    def split(self, size: int) -> Iterator[Samples]:
        """In order, at most so many at a time."""
        for first in range(0, len(self), size):
            cut = slice(first, first + size)
            yield Samples(self.x_t[cut], self.t[cut], self.target[cut], self.weights[cut])

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """One after another."""
        return cls(
            torch.cat([part.x_t for part in parts]),
            torch.cat([part.t for part in parts]),
            torch.cat([part.target for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )


class Draws:
    """Of the rows in the slots; what has left its slot is forgotten."""

    def __init__(self, backbone: Backbone, latents: Latents, seed: int, triples: int) -> None:
        self._backbone, self._latents = backbone, latents
        self._seed, self._count = seed, triples
        self._levels = len(backbone.levels.alphas_cumprod)
        self._held: dict[int, Tensor] = {}
        self._triples: dict[int, Samples] = {}

    @property
    def seated(self) -> set[int]:
        """Rows whose latents are in memory."""
        return set(self._held)

    def seat(self, row: int) -> None:
        """Its latents, from now on."""
        if row not in self._held:
            values = self._latents(row).astype(np.float32)
            self._held[row] = torch.from_numpy(values).to(self._backbone.device)

    def leave(self, row: int) -> None:
        """Nothing more of this row."""
        self._held.pop(row, None)
        self._triples.pop(row, None)

    def step(self, row: int, step: int, each: int, density: Density) -> Samples:
        """The samples of one step, taught by the mean over the row's latents."""
        trained = self._trained(row)
        rng = np.random.Generator(np.random.Philox(key=[self._seed, row], counter=step))
        x0 = trained[pick(len(trained), step, each, self._seed, row)]
        # one timestep in each of `each` strata drawn alike: every step sees all noise levels
        places, weights = density.place((np.arange(each) + rng.random(each)) / each)
        eps = self._noise(row, np.arange(step * each, (step + 1) * each), x0, STEP_DRAW)
        return self._taught(x0, eps, self._t(places), trained, weights)

    def pilot(self, row: int, times: int) -> Samples:
        """So many samples in each bin of noise levels, for a first look."""
        trained, count = self._trained(row), BINS * times
        x0 = trained[np.resize(np.arange(len(trained)), count)]
        eps = self._noise(row, np.arange(count), x0, PILOT_DRAW)
        t = self._t((np.arange(count) + 0.5) / count)
        return self._taught(x0, eps, t, trained, np.ones(count))

    def triples(self, row: int, density: Density) -> Samples:
        """The fixed (latent, t, noise) that judge a row; each is held to its own latent."""
        if row not in self._triples:
            held, levels = self._held[row], self._backbone.levels
            judging = np.resize(judge_latents(len(held))[1], self._count)
            places, weights = density.place((np.arange(self._count) + 0.5) / self._count)
            x0, t = held[torch.from_numpy(judging).to(held.device)], self._t(places)
            eps = self._noise(row, np.arange(self._count), x0, JUDGE_DRAW)
            self._triples[row] = Samples(
                levels.noised(x0, eps, t),
                t,
                levels.target(x0, eps, t),
                weights / weights.mean(),
            )
        return self._triples[row]

    def _trained(self, row: int) -> Tensor:
        """The latents of a row that it learns from."""
        held = self._held[row]
        return held[torch.from_numpy(judge_latents(len(held))[0]).to(held.device)]

    def _taught(self, x0: Tensor, eps: Tensor, t: Tensor, by: Tensor, weights: Array) -> Samples:
        x_t, target = expected_target(self._backbone.levels, x0, eps, t, by)
        return Samples(x_t, t, target, weights)

    def _t(self, places: Array) -> Tensor:
        """Timesteps at these places in [0, 1)."""
        return torch.from_numpy((places * self._levels).astype(np.int64)).to(self._backbone.device)

    def _noise(self, row: int, images: Array, like: Tensor, draw: int) -> Tensor:
        shape = tuple(like.shape[1:])
        if like.device.type == "cpu":
            return torch.from_numpy(noise.normal(self._seed, row, images, shape, draw))
        return noise.normal_torch(self._seed, row, images, shape, draw, like.device)


def judge_latents(count: int) -> tuple[Array, Array]:
    """(training, judging) latent numbers of a row; a handful of images does both."""
    held = int(count * HELD)
    every = np.arange(count)
    if held == 0:
        return every, every
    # the collages come most real first: judge on every fifth, not on the worst
    judging = every[:: round(1 / HELD)][:held]
    return np.setdiff1d(every, judging), judging


def pick(count: int, step: int, each: int, seed: int, row: int) -> Array:
    """`each` of `count` latent numbers: every latent once before any comes again."""
    places = np.arange(step * each, (step + 1) * each)
    found = np.empty(each, dtype=np.int64)
    for epoch in np.unique(places // count):
        rng = np.random.Generator(np.random.Philox(key=[seed + 1, row], counter=int(epoch)))
        here = places // count == epoch
        found[here] = rng.permutation(count)[places[here] % count]
    return found
