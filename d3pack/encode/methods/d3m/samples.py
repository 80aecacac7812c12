"""What a row is fitted to: latents, noise levels and noise of its steps, validation and pilot.

Everything drawn depends on the row, the number of the draw and the density of noise levels alone,
so a run that goes on after a stop sees what it would have seen, whichever rows share its steps.

Two things make few samples enough. Noise levels are drawn in proportion to how loud the gradient of
a single sample is there: up to ten times as loud at one end as at the other. And the target at a
noised latent is not the one latent under it but the mean over all latents of the row, weighted by
their likelihood: the mean gradient is the same, and its variance at the loudest levels is half (Xu,
Tong and Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models",
2023, over a batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, Levels
from d3pack.decode import noise

Array = npt.NDArray[Any]
# row -> (N, C, H, W), in memory only while the row is in a slot
Latents = Callable[[int], Array]

BINS = 10  # of equal width, over all noise levels
FLOOR = 0.1  # share of the draws that is spread evenly: no weight is above 1 / FLOOR
VALIDATION_SHARE = 0.2  # of a row's latents
# draw words of the noise, apart from those of the pack's own images
STEP_DRAW, VALIDATION_DRAW, PILOT_DRAW = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Density:
    """How often each tenth of the noise levels is drawn; the shares sum to one."""

    shares: Array

    @classmethod
    def even(cls) -> Density:
        """Return the density that draws every level as often as any other."""
        return cls(np.full(BINS, 1 / BINS))

    @classmethod
    def of_squares(cls, squares: Array) -> Density:
        """Return the density for the mean squared gradient in each bin."""
        loud = np.sqrt(squares)
        total = loud.sum()
        if total == 0:
            return cls.even()
        return cls(FLOOR / len(squares) + (1 - FLOOR) * loud / total)

    def place(self, uniform: Array) -> tuple[Array, Array]:
        """Return levels in [0, 1) at these quantiles, and the weights of samples there."""
        edges = np.concatenate([[0.0], np.cumsum(self.shares)])
        bins = np.clip(np.searchsorted(edges, uniform, side="right") - 1, 0, len(self.shares) - 1)
        within = (uniform - edges[bins]) / self.shares[bins]
        places = np.minimum((bins + within) / len(self.shares), np.nextafter(1.0, 0.0))
        return places, 1 / (len(self.shares) * self.shares[bins])


@dataclass(frozen=True, slots=True)
class Samples:
    """Noised latents, what the backbone should predict there, and what each counts."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    weights: Array

    def __len__(self) -> int:
        return len(self.t)

    @property
    def values(self) -> int:
        """Numbers in which a sample is compared."""
        return self.target[0].numel()

    def split(self, size: int) -> Iterator[Samples]:
        """Yield them in order, at most `size` at a time."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield Samples(self.x_t[part], self.t[part], self.target[part], self.weights[part])

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Return all parts, one after another."""
        return cls(
            torch.cat([part.x_t for part in parts]),
            torch.cat([part.t for part in parts]),
            torch.cat([part.target for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )


def expected_target(
    levels: Levels, x0: Tensor, eps: Tensor, t: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Return noised latents, and what the model should predict there on average over `latents`.

    x0 are some of the latents.
    """
    x_t = levels.noised(x0, eps, t)
    rows = latents.flatten(1).double()  # the exponents are differences of large numbers
    of_x0, of_eps = (rows.new_tensor(power)[t.to(rows.device)][:, None] for power in levels.powers)
    # log of exp(-|x_t - sqrt(of_x0) x|^2 / (2 of_eps)), without what all images share
    near = of_x0.sqrt() * (x_t.flatten(1).double() @ rows.T) - of_x0 * rows.square().sum(1) / 2
    mean = torch.softmax(near / of_eps, 1) @ rows
    return x_t, levels.target_towards(x_t, mean.reshape(x0.shape).to(x0.dtype), t)


class Draws:
    """Draws samples of the rows in the slots; what has left its slot is forgotten."""

    def __init__(self, backbone: Backbone, latents: Latents, seed: int, triples: int) -> None:
        self._backbone, self._latents = backbone, latents
        self._seed, self._count = seed, triples
        self._levels = len(backbone.levels.alphas_cumprod)
        self._seated: dict[int, Tensor] = {}
        self._triples: dict[int, Samples] = {}

    @property
    def seated(self) -> set[int]:
        """Rows whose latents are in memory."""
        return set(self._seated)

    def seat(self, row: int) -> None:
        """Load the latents of a row."""
        if row not in self._seated:
            values = self._latents(row).astype(np.float32)
            self._seated[row] = torch.from_numpy(values).to(self._backbone.device)

    def leave(self, row: int) -> None:
        """Forget a row."""
        self._seated.pop(row, None)
        self._triples.pop(row, None)

    def step(self, row: int, step: int, each: int, density: Density) -> Samples:
        """Return the samples of one step, with the mean over the row's latents as target."""
        latents = self._training(row)
        rng = np.random.Generator(np.random.Philox(key=[self._seed, row], counter=step))
        x0 = latents[pick(len(latents), step, each, self._seed, row)]
        # one level in each of `each` equally likely strata: every step sees all noise levels
        places, weights = density.place((np.arange(each) + rng.random(each)) / each)
        eps = self._noise(row, np.arange(step * each, (step + 1) * each), x0, STEP_DRAW)
        return self._expected(x0, eps, self._t(places), latents, weights)

    def pilot(self, row: int, times: int) -> Samples:
        """Return `times` samples in each bin of noise levels, for a first look."""
        latents, count = self._training(row), BINS * times
        x0 = latents[np.resize(np.arange(len(latents)), count)]
        eps = self._noise(row, np.arange(count), x0, PILOT_DRAW)
        t = self._t((np.arange(count) + 0.5) / count)
        return self._expected(x0, eps, t, latents, np.ones(count))

    def triples(self, row: int, density: Density) -> Samples:
        """Return the fixed (latent, t, noise) that validate a row, with the latent's own target."""
        if row not in self._triples:
            latents, levels = self._seated[row], self._backbone.levels
            numbers = np.resize(split_latents(len(latents))[1], self._count)
            places, weights = density.place((np.arange(self._count) + 0.5) / self._count)
            x0, t = latents[torch.from_numpy(numbers).to(latents.device)], self._t(places)
            eps = self._noise(row, np.arange(self._count), x0, VALIDATION_DRAW)
            self._triples[row] = Samples(
                levels.noised(x0, eps, t),
                t,
                levels.target(x0, eps, t),
                weights / weights.mean(),
            )
        return self._triples[row]

    def _training(self, row: int) -> Tensor:
        latents = self._seated[row]
        return latents[torch.from_numpy(split_latents(len(latents))[0]).to(latents.device)]

    def _expected(
        self, x0: Tensor, eps: Tensor, t: Tensor, latents: Tensor, weights: Array
    ) -> Samples:
        x_t, target = expected_target(self._backbone.levels, x0, eps, t, latents)
        return Samples(x_t, t, target, weights)

    def _t(self, places: Array) -> Tensor:
        """Timesteps at these places in [0, 1)."""
        return torch.from_numpy((places * self._levels).astype(np.int64)).to(self._backbone.device)

    def _noise(self, row: int, images: Array, like: Tensor, draw: int) -> Tensor:
        shape = tuple(like.shape[1:])
        if like.device.type == "cpu":
            return torch.from_numpy(noise.normal(self._seed, row, images, shape, draw))
        return noise.normal_torch(self._seed, row, images, shape, draw, like.device)


def split_latents(count: int) -> tuple[Array, Array]:
    """Return the numbers of a row's latents for training and validation; of a handful, all both."""
    validating = int(count * VALIDATION_SHARE)
    numbers = np.arange(count)
    if validating == 0:
        return numbers, numbers
    # collages come most typical first: validate on every fifth, not on the last
    validation = numbers[:: round(1 / VALIDATION_SHARE)][:validating]
    return np.setdiff1d(numbers, validation), validation


def pick(count: int, step: int, each: int, seed: int, row: int) -> Array:
    """Return `each` of `count` latent numbers: every latent once before any comes again."""
    places = np.arange(step * each, (step + 1) * each)
    picks = np.empty(each, dtype=np.int64)
    for epoch in np.unique(places // count):
        rng = np.random.Generator(np.random.Philox(key=[seed + 1, row], counter=int(epoch)))
        in_epoch = places // count == epoch
        picks[in_epoch] = rng.permutation(count)[places[in_epoch] % count]
    return picks
