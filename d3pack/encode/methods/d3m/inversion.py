"""Textual inversion of many classes in one batch.

A row is one mode of one class: k vectors and its own latents. Rows are fitted in groups, one group
after the other. The rows of a group share each forward and backward pass of the frozen backbone,
what the passes tell about the curvature of the loss (`curvature`), and the density of noise levels
that a pilot has measured; groups share nothing, so a prompt depends on its group alone, whatever
was fitted before it or elsewhere. What a row is fitted to (`samples`) depends on the row, its own
step count and that density. The state is a few arrays, so a run that was killed goes on as if it
had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from d3pack.backbones import Backbone, Condition
from d3pack.encode.methods.d3m.curvature import TRUST, Curvature
from d3pack.encode.methods.d3m.samples import BINS, Density, Draws, Latents, Samples
from d3pack.encode.settings import D3MSettings
from d3pack.system import Events, seconds_of

Array = npt.NDArray[Any]
RoundTrip = Callable[[Array], Array]  # (rows, k, D) -> what the pack's codec makes of it

WAITING, EXPLORING, COOLING, DONE = 0, 1, 2, 3
AVERAGE = 0.9  # decay of the running mean of a row's vectors, which is validated on the way
PILOT = 200  # samples, over the rows of a group, that measure density and curvature


class Keeper(Protocol):
    """Keeps the state between processes."""

    def load(self) -> dict[str, Array] | None: ...

    def save(self, state: dict[str, Array], *, last: bool = False) -> None: ...


@dataclass(slots=True)
class Fitted:
    """The result, a row each."""

    vectors: Array  # (R, k, D); the codec was in the loop, but has not rounded them
    samples: Array  # forward and backward passes
    validated: Array  # forward passes
    start_loss: Array  # of the start vectors, on the row's triples
    loss: Array  # of the final ones


def fresh_state(start: Array) -> dict[str, Array]:
    """Return the state before the first step."""
    rows = len(start)
    state = {name: start.copy() for name in ("vectors", "mean", "best")}
    state |= {name: np.zeros(rows, np.int64) for name in ("status", "step", "cooled", "stall")}
    state |= {name: np.zeros(rows, np.int64) for name in ("samples", "validated")}
    state |= {name: np.full(rows, np.inf) for name in ("start_loss", "best_loss", "loss")}
    state["density"] = Density.even().shares
    unknown = Curvature.unknown(*start.shape[1:])
    state["curvature"], state["seen"] = unknown.matrices, unknown.seen
    return state


def groups_of(rows: int, slots: int) -> list[Array]:
    """Return the rows of each group: as few groups as slots allow, of equal size but for one."""
    return np.array_split(np.arange(rows), -(-rows // slots))


def solve_seconds(rows: int, vectors: int, width: int, slots: int) -> float:
    """Return the seconds that a step of all groups takes beside the backbone's own."""
    groups = groups_of(rows, slots)
    known = Curvature.unknown(vectors, width)
    known.matrices[:], known.seen[:] = np.eye(known.matrices.shape[1]), 1
    gradients = np.ones((len(groups[0]), vectors, width))
    with threadpool_limits(1, user_api="blas"):
        return len(groups) * seconds_of(lambda: known.steps(gradients, 1))


class Inversion:
    """Fits all rows.

    Args:
        backbone: the frozen model.
        start: vectors (R, k, D) that rows start at.
        latents: latents of a row.
        round_trip: what the codec of the pack makes of vectors.
        settings: lengths and sizes of the fit.
        template: sentence around the vectors; None: they are outputs of the text encoder.
        seed: decides what is drawn.
        keeper: where the state is; `run` goes on from it.
        events: whom to report to.
        groups: numbers of the groups to fit; by default all.
    """

    def __init__(
        self,
        backbone: Backbone,
        start: Array,
        latents: Latents,
        round_trip: RoundTrip,
        settings: D3MSettings,
        *,
        template: str | None,
        seed: int,
        keeper: Keeper,
        events: Events,
        groups: Sequence[int] | None = None,
    ) -> None:
        self._backbone, self._settings, self._template = backbone, settings, template
        self._round_trip, self._keeper, self._events = round_trip, keeper, events
        self._start = start.astype(np.float32)
        self._unit = np.sqrt((self._start**2).mean((1, 2))).clip(1e-4)
        every = groups_of(len(start), settings.slots)
        self._each = max(1, settings.batch // len(every[0]))
        self._groups = every if groups is None else [every[group] for group in groups]
        self._draws = Draws(backbone, latents, seed, settings.triples)
        self._state = keeper.load() or fresh_state(self._start)
        self._curvature = Curvature(self._state["curvature"], self._state["seen"])

    def run(self) -> Fitted:
        """Fit all rows, from where the keeper's state is."""
        state, settings = self._state, self._settings
        total = sum(map(len, self._groups)) * (settings.steps + settings.cool)
        # numpy on one thread: its pool and torch's would wait for each other at every step
        stage = self._events.stage("invert", total, "steps", part="inversion")
        with threadpool_limits(1, user_api="blas"), stage:
            while self._seat():
                active = np.flatnonzero(
                    (state["status"] == EXPLORING) | (state["status"] == COOLING)
                )
                for _ in range(self._stretch(active)):
                    self._step(active, self._each)
                self._validate(active)
                self._keeper.save(state)
                known = np.isfinite(state["start_loss"]) & np.isfinite(state["best_loss"])
                self._events.step(
                    self._done(),
                    samples=int(state["samples"].sum()),
                    start_loss=round(float(state["start_loss"][known].mean()), 5),
                    loss=round(float(state["best_loss"][known].mean()), 5),
                )
        self._keeper.save(state, last=True)
        return Fitted(
            state["vectors"],
            state["samples"],
            state["validated"],
            state["start_loss"],
            state["loss"],
        )

    def _done(self) -> int:
        """Steps of all rows that are done, or left out since the row had stopped gaining."""
        state, settings = self._state, self._settings
        done = np.select(
            [state["status"] == EXPLORING, state["status"] == COOLING, state["status"] == DONE],
            [state["step"], settings.steps + state["cooled"], settings.steps + settings.cool],
        )
        return int(done.sum())

    def _seat(self) -> bool:
        """Seat the rows at work; when there are none, the next group. False when no row is left."""
        status = self._state["status"]
        for row in np.flatnonzero(status == DONE):
            self._draws.leave(int(row))
        while not (working := (status == EXPLORING) | (status == COOLING)).any():
            waiting = [group for group in self._groups if (status[group] == WAITING).any()]
            if not waiting:
                return False
            self._begin(waiting[0])
        for row in np.flatnonzero(working):
            self._draws.seat(int(row))
        return True

    def _begin(self, group: Array) -> None:
        """Seat a group: it knows nothing of the ones before."""
        state, settings = self._state, self._settings
        state["status"][group] = EXPLORING if settings.steps else COOLING
        for row in group:
            self._draws.seat(int(row))
        learns = settings.steps + settings.cool > 0
        if learns:
            state["density"] = Density.even().shares
            state["curvature"][:], state["seen"][:] = 0, 0
            self._measure(group)
        losses = self._losses(group, self._start[group])
        state["start_loss"][group] = state["best_loss"][group] = losses
        if not learns:
            self._finish(group)
            for row in group:
                self._draws.leave(int(row))

    def _stretch(self, active: Array) -> int:
        """Steps until the next validation: no row may run past its end."""
        state, settings = self._state, self._settings
        exploring = active[state["status"][active] == EXPLORING]
        cooling = active[state["status"][active] == COOLING]
        left = [*(settings.steps - state["step"][exploring])]
        left += [*(settings.cool - state["cooled"][cooling])]
        return int(min([settings.validate_every, *left])) if len(active) else 0

    # -- one step ------------------------------------------------------------------------------

    def _step(self, active: Array, each: int) -> None:
        state = self._state
        cooling = state["status"][active] == COOLING
        values = state["vectors"][active]
        # straight through: the loss sees what the codec keeps, the gradient moves what it rounds
        seen = np.where(cooling[:, None, None], self._round_trip(values), values)
        samples = self._samples(active, each)
        gradients, losses = self._gradients(seen, samples)
        weights = samples.weights.reshape(losses.shape)
        self._curvature.learn(gradients, losses, weights, samples.values)
        self._move(active, (gradients * weights[..., None, None]).mean(1), each, cooling)
        state["samples"][active] += each
        state["step"][active] += 1
        state["cooled"][active[cooling]] += 1

    def _samples(self, active: Array, each: int) -> Samples:
        """Of one step, row by row."""
        density, steps = Density(self._state["density"]), self._state["step"]
        return Samples.joined(
            [self._draws.step(int(row), int(steps[row]), each, density) for row in active]
        )

    def _gradients(self, vectors: Array, samples: Samples) -> tuple[Array, Array]:
        """Of the samples of rows, (R, S, k, D) and (R, S); one that overflows does not count."""
        each = len(samples) // len(vectors)
        leaf = torch.from_numpy(vectors.repeat(each, 0)).to(self._backbone.device).requires_grad_()
        loss = self._loss(leaf, samples)
        (gradient,) = torch.autograd.grad(loss.sum(), [leaf])
        gradients, losses = gradient.double().cpu().numpy(), loss.detach().double().cpu().numpy()
        finite = np.isfinite(gradients).all((1, 2)) & np.isfinite(losses)
        gradients = np.where(finite[:, None, None], gradients, 0)
        losses = np.where(finite, losses, 1)
        return gradients.reshape(-1, each, *vectors.shape[1:]), losses.reshape(-1, each)

    def _loss(self, vectors: Tensor, samples: Samples) -> Tensor:
        """Squared error of each sample in the backbone's own training space; samples row by row."""
        each = len(samples) // len(vectors)
        condition = self._backbone.condition(vectors, self._template)
        # expanded, not indexed: the backward pass is then a plain sum, in one order
        spread = Condition(
            {
                name: value[:, None].expand(-1, each, *value.shape[1:]).flatten(0, 1)
                for name, value in condition.tensors.items()
            }
        )
        out = self._backbone.predict(samples.x_t, samples.t, spread)
        return (out.float() - samples.target).square().mean((1, 2, 3))

    def _measure(self, rows: Array) -> None:
        """Measure the density of noise levels, and curvature, at the start vectors."""
        times = -(-PILOT // (BINS * len(rows)))  # in each bin, of each row
        squares = np.zeros(BINS)
        for row in rows:
            loudness = []
            for part in self._draws.pilot(int(row), times).split(self._settings.batch):
                gradients, losses = self._gradients(self._start[[row]], part)
                self._curvature.learn(gradients, losses, part.weights[None], part.values)
                loudness.append(np.square(gradients[0]).sum((1, 2)))
            of_bins = np.concatenate(loudness).reshape(BINS, times).mean(1)
            squares += of_bins / max(of_bins.sum(), 1e-30)
        self._state["density"] = Density.of_squares(squares).shares
        self._state["samples"][rows] += BINS * times

    def _move(self, active: Array, gradients: Array, each: int, cooling: Array) -> None:
        state, settings = self._state, self._settings
        left = 1 - state["cooled"][active] / max(1, settings.cool)
        rate = settings.lr * np.where(cooling, left, 1.0)
        moves = rate[:, None, None] * self._curvature.steps(gradients, each)
        length = np.sqrt(np.square(moves).mean((1, 2))).clip(1e-30)
        moves *= np.minimum(1, TRUST * self._unit[active] / length)[:, None, None]
        state["vectors"][active] = (state["vectors"][active] + moves).astype(np.float32)
        mean = state["mean"]
        mean[active] = AVERAGE * mean[active] + (1 - AVERAGE) * state["vectors"][active]

    # -- validation ----------------------------------------------------------------------------

    @torch.no_grad()
    def _losses(self, rows: Array, vectors: Array) -> Array:
        """Loss of each row's vectors on its triples."""
        means, density = [], Density(self._state["density"])
        at_once = max(1, self._settings.batch // self._settings.triples)
        for start in range(0, len(rows), at_once):
            part = [self._draws.triples(int(row), density) for row in rows[start : start + at_once]]
            samples = Samples.joined(part)
            values = torch.from_numpy(vectors[start : start + at_once]).to(self._backbone.device)
            losses = self._loss(values, samples).double().cpu()
            weighted = losses * torch.from_numpy(samples.weights)
            means.append(weighted.reshape(len(part), -1).mean(1).numpy())
        self._state["validated"][rows] += self._settings.triples
        return np.concatenate(means)

    def _validate(self, active: Array) -> None:
        """Note gains; rows without one begin to cool, rows that have cooled are done."""
        state, settings = self._state, self._settings
        exploring = active[state["status"][active] == EXPLORING]
        if len(exploring):
            losses = self._losses(exploring, state["mean"][exploring])
            gained = losses < state["best_loss"][exploring] * (1 - settings.tolerance)
            state["stall"][exploring] = np.where(gained, 0, state["stall"][exploring] + 1)
            ahead = exploring[losses < state["best_loss"][exploring]]
            state["best"][ahead] = state["mean"][ahead]
            state["best_loss"][exploring] = np.minimum(losses, state["best_loss"][exploring])
            over = (state["stall"][exploring] >= settings.patience) | (
                state["step"][exploring] >= settings.steps
            )
            turning = exploring[over]
            state["status"][turning] = COOLING
            # a mean is the better start: it lies in the middle of the noise ball
            state["vectors"][turning] = state["best"][turning]
        cooling = active[state["status"][active] == COOLING]
        ended = cooling[state["cooled"][cooling] >= settings.cool]
        if len(ended):
            self._finish(ended)

    def _finish(self, rows: Array) -> None:
        """Keep the best of what the pack could hold: it is never worse than the class name."""
        state = self._state
        # cooled, averaged while cooling, the best before, the name: the best after the codec
        trials = [state[name][rows].copy() for name in ("vectors", "mean", "best")]
        for trial in (*trials, self._start[rows]):
            losses = self._losses(rows, self._round_trip(trial))
            better = losses < state["loss"][rows]
            state["vectors"][rows[better]] = trial[better]
            state["loss"][rows[better]] = losses[better]
        state["best_loss"][rows] = np.minimum(state["best_loss"][rows], state["loss"][rows])
        state["status"][rows] = DONE
