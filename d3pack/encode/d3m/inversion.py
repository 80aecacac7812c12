"""Textual inversion of many classes in one batch.

A row is one mode of one class: k vectors and its own latents. The rows in the slots share each
forward and backward pass of the frozen backbone, and what the passes tell about the curvature of
the loss (`curvature`); a row that stops gaining leaves its slot to a waiting one. What a row draws
(latents, timesteps, noise) depends on the row, its own step count and the density of timesteps that
the first rows in the slots have measured for all; what it is taught there is the mean over its
latents (`expected`). The whole state is a few arrays, so a run that was killed goes on as if it had
not been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from d3pack import noise
from d3pack.backbones import Backbone, Condition
from d3pack.encode.d3m.curvature import TRUST, Curvature
from d3pack.encode.d3m.density import BINS, Density
from d3pack.encode.d3m.expected import expected_target
from d3pack.encode.events import Events

Array = npt.NDArray[Any]
Latents = Callable[
    [int], Array
]  # row -> (N, C, H, W), held in memory only while the row is in a slot
RoundTrip = Callable[
    [Array], Array
]  # (rows, k, D) -> the same as the pack's codec will give it back

WAITING, EXPLORING, COOLING, DONE = 0, 1, 2, 3
AVERAGE = 0.9  # of the running mean of a row's vectors, on which it is judged while it explores
HELD = 0.2  # share of a row's latents that only judge
PILOT = 200  # samples, over the first rows, that measure the density of timesteps and curvature
# noise words apart from those of the pack's own images
STEP_DRAW, JUDGE_DRAW, PILOT_DRAW = 1, 2, 3


@dataclass(frozen=True, slots=True)
class InversionOptions:
    """How rows are fitted."""

    template: str
    lr: float  # in units of Newton's steps
    steps: int
    cool: int
    batch: int
    slots: int
    validate_every: int
    triples: int
    patience: int
    tolerance: float
    seed: int


class Keeper(Protocol):
    """Where the state is kept between processes."""

    def load(self) -> dict[str, Array] | None: ...

    def save(self, state: dict[str, Array], *, last: bool = False) -> None: ...


@dataclass(slots=True)
class Fitted:
    """What inversion gives back, a row each."""

    vectors: Array  # (R, k, D); the codec was in the loop, but has not rounded them
    samples: Array  # forward and backward passes
    judged: Array  # forward passes
    start_loss: Array  # of the start vectors, on the row's triples
    loss: Array  # of the final ones


def fresh_state(start: Array) -> dict[str, Array]:
    """The state before the first step."""
    rows = len(start)
    state = {name: start.copy() for name in ("vectors", "mean", "best")}
    state |= {name: np.zeros(rows, np.int64) for name in ("status", "step", "cooled", "stall")}
    state |= {name: np.zeros(rows, np.int64) for name in ("samples", "judged")}
    state |= {name: np.full(rows, np.inf) for name in ("start_loss", "best_loss", "loss")}
    state["density"] = Density.even().shares
    unknown = Curvature.unknown(*start.shape[1:])
    state["curvature"], state["seen"] = unknown.matrices, unknown.seen
    return state


def judge_latents(count: int) -> tuple[Array, Array]:
    """(training, judging) latent numbers of a row; a handful of images does both."""
    held = int(count * HELD)
    every = np.arange(count)
    if held == 0:
        return every, every
    # the collages come most real first: judge on every fifth, not on the worst
    judging = every[:: round(1 / HELD)][:held]
    return np.setdiff1d(every, judging), judging


class Inversion:
    """Fits all rows; `run` goes on from the keeper's state."""

    def __init__(
        self,
        backbone: Backbone,
        start: Array,
        latents: Latents,
        round_trip: RoundTrip,
        options: InversionOptions,
        keeper: Keeper,
        events: Events,
    ) -> None:
        self._backbone, self._latents, self._options = backbone, latents, options
        self._round_trip, self._keeper, self._events = round_trip, keeper, events
        self._start = start.astype(np.float32)
        self._unit = np.sqrt((self._start**2).mean((1, 2))).clip(1e-4)
        self._levels = len(backbone.levels.alphas_cumprod)
        self._held: dict[int, Tensor] = {}  # latents of the rows in slots
        self._draws: dict[int, tuple[Tensor, ...]] = {}  # their triples, and the weights
        self._state = keeper.load() or fresh_state(self._start)
        self._curvature = Curvature(self._state["curvature"], self._state["seen"])

    def run(self) -> Fitted:
        state, options = self._state, self._options
        rows = len(self._start)
        width = min(options.slots, rows)
        each = max(1, options.batch // width)
        # numpy on one thread: its pool and torch's would wait for each other at every step
        with threadpool_limits(1, user_api="blas"), self._events.stage("invert", rows, "rows"):
            while True:
                if not self._seat(width):
                    break
                active = np.flatnonzero(
                    (state["status"] == EXPLORING) | (state["status"] == COOLING)
                )
                for _ in range(self._stretch(active)):
                    self._step(active, each)
                self._judge(active)
                self._keeper.save(state)
                done = int((state["status"] == DONE).sum())
                good = np.isfinite(state["start_loss"]) & np.isfinite(state["best_loss"])
                self._events.step(
                    done,
                    samples=int(state["samples"].sum()),
                    start_loss=round(float(state["start_loss"][good].mean()), 5),
                    loss=round(float(state["best_loss"][good].mean()), 5),
                )
        self._keeper.save(state, last=True)
        return Fitted(
            state["vectors"],
            state["samples"],
            state["judged"],
            state["start_loss"],
            state["loss"],
        )

    def _seat(self, width: int) -> bool:
        """Fill free slots with waiting rows, in order; False when nobody is left."""
        status = self._state["status"]
        free = width - int(((status == EXPLORING) | (status == COOLING)).sum())
        fresh = np.flatnonzero(status == WAITING)[:free]
        for row in fresh:
            status[row] = EXPLORING if self._options.steps else COOLING
        for row in np.flatnonzero(status == DONE):
            self._held.pop(int(row), None)
            self._draws.pop(int(row), None)
        for row in np.flatnonzero((status == EXPLORING) | (status == COOLING)):
            if int(row) not in self._held:
                values = self._latents(int(row)).astype(np.float32)
                self._held[int(row)] = torch.from_numpy(values).to(self._backbone.device)
        learns = self._options.steps + self._options.cool > 0
        if len(fresh):
            if learns and not self._state["samples"].any():
                self._measure(fresh)
            losses = self._losses(fresh, self._start[fresh])
            self._state["start_loss"][fresh] = self._state["best_loss"][fresh] = losses
            if not learns:
                self._finish(fresh)
        return bool(((status == EXPLORING) | (status == COOLING)).any()) or bool(
            (status == WAITING).any()
        )

    def _stretch(self, active: Array) -> int:
        """Steps until the next judgement: no row may run past its end."""
        state, options = self._state, self._options
        cooling = active[state["status"][active] == COOLING]
        left = options.cool - state["cooled"][cooling]
        return int(min([options.validate_every, *left])) if len(active) else 0

    # -- one step ------------------------------------------------------------------------------

    def _step(self, active: Array, each: int) -> None:
        state = self._state
        cooling = state["status"][active] == COOLING
        values = state["vectors"][active]
        # straight through: the loss sees what the codec keeps, the gradient moves what it rounds
        seen = np.where(cooling[:, None, None], self._round_trip(values), values)
        x_t, t, target, weights = self._draw(active, each)
        gradients, losses = self._gradients(seen, x_t, t, target)
        self._curvature.learn(gradients, losses, weights, target[0].numel())
        self._move(active, (gradients * weights[..., None, None]).mean(1), cooling)
        state["samples"][active] += each
        state["step"][active] += 1
        state["cooled"][active[cooling]] += 1

    def _gradients(
        self, vectors: Array, x_t: Tensor, t: Tensor, target: Tensor
    ) -> tuple[Array, Array]:
        """Of each sample of each row, (R, S, k, D) and (R, S); one that overflows says nothing."""
        each = len(x_t) // len(vectors)
        leaf = torch.from_numpy(vectors.repeat(each, 0)).to(self._backbone.device).requires_grad_()
        found = self._loss(leaf, x_t, t, target)
        (slopes,) = torch.autograd.grad(found.sum(), [leaf])
        gradients, losses = slopes.double().cpu().numpy(), found.detach().double().cpu().numpy()
        good = np.isfinite(gradients).all((1, 2)) & np.isfinite(losses)
        gradients, losses = np.where(good[:, None, None], gradients, 0), np.where(good, losses, 1)
        return gradients.reshape(-1, each, *vectors.shape[1:]), losses.reshape(-1, each)

    def _loss(self, vectors: Tensor, x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
        """Squared error of each sample in the backbone's own training space; samples row by row."""
        each = len(x_t) // len(vectors)
        condition = self._backbone.condition(vectors, self._options.template)
        # expanded, not indexed: the backward pass is then a plain sum, in one order
        spread = Condition(
            {
                name: value[:, None].expand(-1, each, *value.shape[1:]).flatten(0, 1)
                for name, value in condition.tensors.items()
            }
        )
        out = self._backbone.predict(x_t, t, spread)
        return (out.float() - target).square().mean((1, 2, 3))

    def _measure(self, rows: Array) -> None:
        """The density of timesteps, and curvature, from single samples at the start vectors."""
        device = self._backbone.device
        times = -(-PILOT // (BINS * len(rows)))  # in each bin, of each row
        each = BINS * times
        levels = torch.from_numpy((np.arange(each) + 0.5) / each * self._levels).long().to(device)
        squares = np.zeros(BINS)
        for row in rows:
            trained = self._trained(int(row))
            x0 = trained[np.resize(np.arange(len(trained)), each)]
            eps = self._noise(int(row), np.arange(each), x0.shape[1:], PILOT_DRAW)
            x_t, target = expected_target(self._backbone.levels, x0, eps, levels, trained)
            found = []
            for part in torch.split(torch.arange(each), self._options.batch):
                gradients, losses = self._gradients(
                    self._start[[row]], x_t[part], levels[part], target[part]
                )
                self._curvature.learn(gradients, losses, np.ones((1, len(part))), x0[0].numel())
                found.append(np.square(gradients[0]).sum((1, 2)))
            of_bins = np.concatenate(found).reshape(BINS, times).mean(1)
            squares += of_bins / max(of_bins.sum(), 1e-30)
        self._state["density"] = Density.of_squares(squares).shares
        self._state["samples"][rows] += each

    def _draw(self, active: Array, each: int) -> tuple[Tensor, Tensor, Tensor, Array]:
        """Noised latents, timesteps, targets and weights of one step: by row and step count."""
        device, steps = self._backbone.device, self._state["step"]
        density = Density(self._state["density"])
        noised: list[Tensor] = []
        targets: list[Tensor] = []
        times: list[Tensor] = []
        weights: list[Array] = []
        for row in active:
            step = int(steps[row])
            trained = self._trained(int(row))
            rng = np.random.Generator(
                np.random.Philox(key=[self._options.seed, int(row)], counter=step)
            )
            x0 = trained[_pick(len(trained), step, each, self._options.seed, int(row))]
            # one timestep in each of `each` strata drawn alike: every step sees all noise levels
            places, weight = density.place((np.arange(each) + rng.random(each)) / each)
            t = torch.from_numpy((places * self._levels).astype(np.int64)).to(device)
            numbers = np.arange(step * each, (step + 1) * each)
            eps = self._noise(int(row), numbers, x0.shape[1:], STEP_DRAW)
            x_t, target = expected_target(self._backbone.levels, x0, eps, t, trained)
            noised.append(x_t)
            targets.append(target)
            times.append(t)
            weights.append(weight)
        return torch.cat(noised), torch.cat(times), torch.cat(targets), np.stack(weights)

    def _trained(self, row: int) -> Tensor:
        """The latents of a row that it learns from."""
        held = self._held[row]
        return held[torch.from_numpy(judge_latents(len(held))[0]).to(held.device)]

    def _noise(self, rows: Any, images: Any, shape: Any, draw: int) -> Tensor:
        seed, device = self._options.seed, self._backbone.device
        if device.type == "cpu":
            return torch.from_numpy(noise.normal(seed, rows, images, tuple(shape), draw))
        return noise.normal_torch(seed, rows, images, tuple(shape), draw, device)

    def _move(self, active: Array, gradients: Array, cooling: Array) -> None:
        state, options = self._state, self._options
        left = 1 - state["cooled"][active] / max(1, options.cool)
        rate = options.lr * np.where(cooling, left, 1.0)
        moves = rate[:, None, None] * self._curvature.steps(gradients)
        length = np.sqrt(np.square(moves).mean((1, 2))).clip(1e-30)
        moves *= np.minimum(1, TRUST * self._unit[active] / length)[:, None, None]
        state["vectors"][active] = (state["vectors"][active] + moves).astype(np.float32)
        mean = state["mean"]
        mean[active] = AVERAGE * mean[active] + (1 - AVERAGE) * state["vectors"][active]

    # -- judgement -----------------------------------------------------------------------------

    def _triples(self, row: int) -> tuple[Tensor, ...]:
        """The fixed (latent, t, noise) of a row, and what each counts."""
        if row not in self._draws:
            held, count = self._held[row], self._options.triples
            picked = np.resize(judge_latents(len(held))[1], count)
            density = Density(self._state["density"])
            places, weights = density.place((np.arange(count) + 0.5) / count)
            device, levels = self._backbone.device, self._backbone.levels
            x0 = held[torch.from_numpy(picked).to(device)]
            t = torch.from_numpy((places * self._levels).astype(np.int64)).to(device)
            eps = self._noise(row, np.arange(count), held.shape[1:], JUDGE_DRAW)
            self._draws[row] = (
                levels.noised(x0, eps, t),
                t,
                levels.target(x0, eps, t),
                torch.from_numpy(weights / weights.mean()).to(device),
            )
        return self._draws[row]

    @torch.no_grad()
    def _losses(self, rows: Array, vectors: Array) -> Array:
        """Loss of each row's vectors on its triples."""
        found = []
        at_once = max(1, self._options.batch // self._options.triples)
        for start in range(0, len(rows), at_once):
            part = [self._triples(int(row)) for row in rows[start : start + at_once]]
            values = torch.from_numpy(vectors[start : start + at_once]).to(self._backbone.device)
            x_t, t, target, weights = (torch.cat(parts) for parts in zip(*part, strict=True))
            each = self._loss(values, x_t, t, target).double() * weights
            found.append(each.reshape(len(part), -1).mean(1).cpu().numpy())
        self._state["judged"][rows] += self._options.triples
        return np.concatenate(found)

    def _judge(self, active: Array) -> None:
        """Note gains; rows without one begin to cool, rows that have cooled are done."""
        state, options = self._state, self._options
        exploring = active[state["status"][active] == EXPLORING]
        if len(exploring):
            losses = self._losses(exploring, state["mean"][exploring])
            gained = losses < state["best_loss"][exploring] * (1 - options.tolerance)
            state["stall"][exploring] = np.where(gained, 0, state["stall"][exploring] + 1)
            ahead = exploring[losses < state["best_loss"][exploring]]
            state["best"][ahead] = state["mean"][ahead]
            state["best_loss"][exploring] = np.minimum(losses, state["best_loss"][exploring])
            over = (state["stall"][exploring] >= options.patience) | (
                state["step"][exploring] >= options.steps
            )
            turning = exploring[over]
            state["status"][turning] = COOLING
            # a mean is the better start: it lies in the middle of the noise ball
            state["vectors"][turning] = state["best"][turning]
        cooling = active[state["status"][active] == COOLING]
        ended = cooling[state["cooled"][cooling] >= options.cool]
        if len(ended):
            self._finish(ended)

    def _finish(self, rows: Array) -> None:
        """The last judgement, of what the pack will hold: never worse than the class name."""
        state = self._state
        # cooled, averaged while cooling, the best before, the name: whatever the codec leaves best
        trials = [state[name][rows].copy() for name in ("vectors", "mean", "best")]
        for trial in (*trials, self._start[rows]):
            losses = self._losses(rows, self._round_trip(trial))
            better = losses < state["loss"][rows]
            state["vectors"][rows[better]] = trial[better]
            state["loss"][rows[better]] = losses[better]
        state["best_loss"][rows] = np.minimum(state["best_loss"][rows], state["loss"][rows])
        state["status"][rows] = DONE


def _pick(count: int, step: int, each: int, seed: int, row: int) -> Array:
    """`each` of `count` latent numbers: every latent once before any comes again."""
    places = np.arange(step * each, (step + 1) * each)
    found = np.empty(each, dtype=np.int64)
    for epoch in np.unique(places // count):
        rng = np.random.Generator(np.random.Philox(key=[seed + 1, row], counter=int(epoch)))
        here = places // count == epoch
        found[here] = rng.permutation(count)[places[here] % count]
    return found
