"""Inversion on a real, random backbone: the maths against a plain loop, slots, stops, going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_dit, tiny_sd

from d3pack.backbones import Backbone, open_backbone
from d3pack.decode import noise
from d3pack.encode import D3MSettings
from d3pack.encode.methods.d3m import inversion, samples
from d3pack.encode.methods.d3m.curvature import TRUST, Curvature
from d3pack.encode.methods.d3m.inversion import Inversion
from d3pack.encode.methods.d3m.method import round_trip
from d3pack.encode.methods.d3m.samples import BINS, Density, pick, split_latents
from d3pack.system import Events

pytestmark = pytest.mark.heavy

NAMES = ("goldfish", "lemon", "school bus", "penguin", "castle")


class MemoryKeeper:
    """Keeps the state in memory, and fails at a given save."""

    def __init__(self, state: dict[str, Any] | None = None, fail_at: int = 0) -> None:
        self.state, self.fail_at, self.saves = state, fail_at, 0

    def load(self) -> dict[str, Any] | None:
        return None if self.state is None else {k: v.copy() for k, v in self.state.items()}

    def save(self, state: dict[str, Any], *, last: bool = False) -> None:
        self.state = {key: value.copy() for key, value in state.items()}
        self.saves += 1
        if self.saves == self.fail_at:
            raise InterruptedError


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return open_backbone(str(tiny_sd(tmp_path_factory.mktemp("b") / "sd")))


def start_vectors(backbone: Backbone, rows: int, k: int = 1) -> np.ndarray:
    return np.stack([backbone.name_vectors(name, k).numpy() for name in NAMES[:rows]])


def latents(row: int) -> np.ndarray:
    rng = np.random.default_rng(row)
    return (rng.standard_normal((10, 4, 8, 8)) * 0.3 + row - 1).astype(np.float16)


def expected(backbone: Backbone, x_t: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> Any:
    """What the model should say at each x_t, on average over the images x; the slow way."""
    found = []
    for noised, level in zip(x_t.double(), t, strict=True):
        alpha = float(backbone.levels.alphas_cumprod[int(level)])
        exponents = torch.stack(
            [-(noised - alpha**0.5 * one).square().sum() / (2 * (1 - alpha)) for one in x.double()]
        )
        likely = (exponents - exponents.max()).exp()
        velocities = [  # alpha eps - beta x0, where eps is what takes the image to the noised one
            alpha**0.5 * (noised - alpha**0.5 * one) / (1 - alpha) ** 0.5 - (1 - alpha) ** 0.5 * one
            for one in x.double()
        ]
        mean = (likely / likely.sum())[:, None, None, None] * torch.stack(velocities)
        found.append(mean.sum(0))
    return torch.stack(found).float()


def settings(**changes: Any) -> D3MSettings:
    values: dict[str, Any] = {
        "lr": 1.0,
        "steps": 12,
        "cool": 4,
        "batch": 8,
        "slots": 2,
        "validate_every": 4,
        "triples": 4,
        "patience": 5,
        "tolerance": 0.0,
    }
    return D3MSettings(**{**values, **changes})


def inversion_of(
    backbone: Backbone,
    start: np.ndarray,
    options: D3MSettings,
    *,
    codec: Any = lambda rows: rows,
    keeper: MemoryKeeper | None = None,
    source: Any = None,
) -> Inversion:
    return Inversion(
        backbone,
        start,
        source or latents,
        codec,
        options,
        template="a photo of a {}",
        seed=7,
        keeper=keeper or MemoryKeeper(),
        events=Events(),
    )


def fit(
    backbone: Backbone,
    options: D3MSettings,
    rows: int = 3,
    keeper: MemoryKeeper | None = None,
    codec: str = "f16",
) -> inversion.Fitted:
    start = start_vectors(backbone, rows)
    return inversion_of(backbone, start, options, codec=round_trip(codec), keeper=keeper).run()


def test_steps_are_natural_gradients_of_single_samples(backbone: Backbone) -> None:
    """One row, the slow way: a backward pass a sample, and the curvature that they tell."""
    options = settings(steps=6, cool=0, validate_every=6, slots=1, batch=4, triples=1)
    start = start_vectors(backbone, 1)
    unit = float(np.sqrt((start**2).mean()))
    keeper = MemoryKeeper()
    trained = inversion_of(backbone, start, options, keeper=keeper)
    active = np.array([0])
    trained._seat()
    density = Density(trained._state["density"])
    assert density.shares.max() > 1.2 * density.shares.min()
    known = Curvature(trained._state["curvature"].copy(), trained._state["seen"].copy())
    assert inversion.PILOT / 2 < known.seen[0] < inversion.PILOT  # of the pilot; the first fade
    train = split_latents(10)[0]
    x = torch.from_numpy(latents(0).astype(np.float32))
    for step in range(6):
        rng = np.random.Generator(np.random.Philox(key=[7, 0], counter=step))
        places, weights = density.place((np.arange(4) + rng.random(4)) / 4)
        t = torch.from_numpy((places * 1000).astype(np.int64))
        x0 = x[train[pick(len(train), step, 4, 7, 0)]]
        eps = torch.from_numpy(
            noise.normal(7, [0] * 4, np.arange(4 * step, 4 * step + 4), (4, 8, 8), 1)
        )
        x_t = backbone.levels.noised(x0, eps, t)
        target = expected(backbone, x_t, t, x[train])
        gradients, losses = [], []
        for i in range(4):
            leaf = torch.from_numpy(trained._state["vectors"]).clone().requires_grad_()
            out = backbone.predict(x_t[[i]], t[[i]], backbone.condition(leaf))
            loss = (out - target[[i]]).square().mean()
            (gradient,) = torch.autograd.grad(loss, [leaf])
            gradients.append(gradient.double().numpy()[0])
            losses.append(float(loss.detach()))
        each = np.stack(gradients)[None]
        known.learn(each, np.array([losses]), weights[None], 4 * 8 * 8)
        mean = (each[0] * weights[:, None, None]).mean(0, keepdims=True)
        move = options.lr * known.steps(mean, 4)
        length = np.sqrt((move**2).mean())
        move *= min(1, TRUST * unit / length)
        aim = trained._state["vectors"][0] + move[0]
        trained._step(active, 4)
        off = trained._state["vectors"][0] - aim
        assert np.linalg.norm(off) < 1e-3 * np.linalg.norm(move), step
    assert np.abs(trained._state["vectors"] - start).max() > 0.05 * unit


def test_step_is_no_longer_than_trusted(backbone: Backbone) -> None:
    """A backbone that hardly listens asks for steps without end."""
    start = start_vectors(backbone, 2)
    trained = inversion_of(backbone, start, settings(lr=9.0))
    trained._seat()
    trained._state["curvature"] *= 1e-9
    trained._curvature = Curvature(trained._state["curvature"], np.ones(1))
    trained._move(np.arange(2), np.ones_like(start) * 1e3, 4, np.zeros(2, bool))
    moved = trained._state["vectors"] - start
    units = np.sqrt((start**2).mean((1, 2)))
    assert np.allclose(np.sqrt((moved**2).mean((1, 2))), TRUST * units, rtol=1e-4)


def test_sample_that_overflows_does_not_count(backbone: Backbone) -> None:
    start = start_vectors(backbone, 2)
    trained = inversion_of(backbone, start, settings())
    trained._seat()
    drawn = trained._samples(np.arange(2), 4)
    whole, losses = trained._gradients(start, drawn)
    drawn.x_t[5] = float("inf")
    found, left = trained._gradients(start, drawn)
    assert not found[1, 1].any()
    assert np.isfinite(left).all()
    others = np.arange(8) != 5
    assert np.array_equal(found.reshape(8, -1)[others], whole.reshape(8, -1)[others])
    assert np.array_equal(left.reshape(8)[others], losses.reshape(8)[others])


def test_the_loss_falls_and_is_never_worse_than_the_name(backbone: Backbone) -> None:
    options = settings(steps=40, batch=16, triples=8, slots=3)  # one group, one density
    start, codec = start_vectors(backbone, 3), round_trip("f16")
    trained = inversion_of(backbone, start, options, codec=codec)
    fitted = trained.run()
    for row in range(3):
        trained._draws.seat(row)
    # the name itself is a candidate, rounded by the codec
    rounded = trained._losses(np.arange(3), codec(start))
    assert (fitted.loss <= rounded * (1 + 1e-7)).all()
    assert fitted.loss.mean() < fitted.start_loss.mean()


def test_harmful_rate_leaves_the_class_name(backbone: Backbone) -> None:
    fitted = fit(backbone, settings(lr=9.0, steps=8), rows=2)
    assert (fitted.loss <= fitted.start_loss * 1.001).all()


def test_reported_loss_is_of_the_stored_vectors(backbone: Backbone) -> None:
    options = settings(steps=8, cool=4)
    start = start_vectors(backbone, 2)
    trained = inversion_of(backbone, start, options, codec=round_trip("i4"))
    fitted = trained.run()
    stored = round_trip("i4")(fitted.vectors)
    assert not np.array_equal(stored, fitted.vectors)
    for row in range(2):
        trained._draws.seat(row)
    assert np.allclose(trained._losses(np.arange(2), stored), fitted.loss, rtol=1e-5)


def test_groups_follow_one_another(backbone: Backbone) -> None:
    loaded: list[int] = []

    def watch(row: int) -> np.ndarray:
        loaded.append(row)
        return latents(row)

    options = settings(steps=8, cool=4, slots=2, patience=1, tolerance=0.5)
    keeper = MemoryKeeper()
    trained = inversion_of(
        backbone, start_vectors(backbone, 5), options, keeper=keeper, source=watch
    )
    fitted = trained.run()
    assert loaded == [0, 1, 2, 3, 4]
    assert not trained._draws.seated - {4}  # latents of rows that are done are let go
    # nothing gains half of its loss: each row explores for one stretch, and cools
    pilots = [inversion.PILOT // 2] * 4 + [inversion.PILOT]  # of groups of 2, 2 and 1 rows
    assert fitted.samples.tolist() == [(4 + 4) * 4 + pilot for pilot in pilots]
    assert keeper.state is not None
    assert (keeper.state["status"] == inversion.DONE).all()


@pytest.mark.parametrize(
    ("rows", "slots", "sizes"),
    [(5, 2, [2, 2, 1]), (12, 10, [6, 6]), (10, 10, [10]), (3, 10, [3]), (1000, 10, [10] * 100)],
)
def test_groups_are_equal_and_cover_every_row(rows: int, slots: int, sizes: list[int]) -> None:
    groups = inversion.groups_of(rows, slots)
    assert [len(group) for group in groups] == sizes
    assert np.concatenate(groups).tolist() == list(range(rows))


@pytest.mark.parametrize("group", [[0, 1], [2, 3], [4]])
def test_prompt_depends_on_its_group_alone(backbone: Backbone, group: list[int]) -> None:
    """Fitted after the others, or by itself as on another machine: the same bits."""
    options, start = settings(steps=8, slots=2), start_vectors(backbone, 5)
    whole = inversion_of(backbone, start, options).run()
    state = inversion.fresh_state(start.astype(np.float32))
    others = [row for row in range(5) if row not in group]
    state["status"][others] = inversion.DONE
    alone = inversion_of(backbone, start, options, keeper=MemoryKeeper(state)).run()
    assert np.array_equal(alone.vectors[group], whole.vectors[group])
    assert np.array_equal(alone.loss[group], whole.loss[group])
    assert not np.array_equal(alone.vectors[group], start[group])


def test_patience_gives_more_steps_to_rows_that_gain(backbone: Backbone) -> None:
    hasty = fit(backbone, settings(steps=40, patience=1, tolerance=0.2), rows=2)
    patient = fit(backbone, settings(steps=40, patience=50), rows=2)
    assert hasty.samples.sum() < patient.samples.sum()
    assert patient.samples.tolist() == [(40 + 4) * 4 + inversion.PILOT // 2] * 2


@pytest.mark.parametrize("codec", ["i8", pytest.param("pq", marks=pytest.mark.slow)])
def test_run_continues_after_any_validation(backbone: Backbone, codec: str) -> None:
    options = settings(steps=4, cool=4, slots=2, batch=4, triples=2)
    whole = MemoryKeeper()
    expected = fit(backbone, options, 3, whole, codec)
    for stop in range(1, whole.saves):
        keeper = MemoryKeeper(fail_at=stop)
        with pytest.raises(InterruptedError):
            fit(backbone, options, 3, keeper, codec)
        found = fit(backbone, options, 3, MemoryKeeper(keeper.state), codec)
        for name in ("vectors", "samples", "validated", "loss", "start_loss"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (stop, name)


def test_several_vectors_are_fitted_together(backbone: Backbone) -> None:
    start = start_vectors(backbone, 2, k=3)
    fitted = inversion_of(backbone, start, settings(steps=8), codec=round_trip("i8")).run()
    assert fitted.vectors.shape == start.shape
    assert not np.array_equal(fitted.vectors, start)


def test_inversion_on_a_class_conditional_backbone(tmp_path: Path) -> None:
    """DiT: the learned vector stands in for a row of the class table."""
    dit = open_backbone(str(tiny_dit(tmp_path / "dit")))
    start = np.stack([dit.name_vectors(name, 1).detach().numpy() for name in NAMES[:2]])
    options = settings(steps=16, batch=16, triples=8)
    fitted = inversion_of(dit, start, options, codec=round_trip("i8")).run()
    assert np.isfinite(fitted.vectors).all()
    assert (fitted.loss <= fitted.start_loss * 1.001).all()


def test_density_is_measured_on_single_gradients(backbone: Backbone) -> None:
    """Against the slow way: one backward pass a sample."""
    options = settings(slots=1)
    trained = inversion_of(backbone, start_vectors(backbone, 1), options)
    trained._seat()
    count = inversion.PILOT
    assert trained._state["samples"].tolist() == [count]
    squares = np.zeros(BINS)
    x = torch.from_numpy(latents(0).astype(np.float32))
    train = split_latents(10)[0]
    for i in range(count):
        t = torch.tensor([int((i + 0.5) / count * 1000)])
        x0 = x[[int(train[i % len(train)])]]
        eps = torch.from_numpy(noise.normal(7, 0, np.array([i]), (4, 8, 8), samples.PILOT_DRAW))
        leaf = torch.from_numpy(start_vectors(backbone, 1)).requires_grad_()
        x_t = backbone.levels.noised(x0, eps, t)
        out = backbone.predict(x_t, t, backbone.condition(leaf))
        loss = (out - expected(backbone, x_t, t, x[train])).square().mean()
        (gradient,) = torch.autograd.grad(loss, [leaf])
        squares[i * BINS // count] += float(gradient.square().sum())
    assert np.allclose(Density.of_squares(squares).shares, trained._state["density"], rtol=1e-3)


@pytest.mark.parametrize(("steps", "taken"), [(2, 5), (7, 10)])
def test_steps_do_not_exceed_the_limits(backbone: Backbone, steps: int, taken: int) -> None:
    """Also where judgements come less often, or not when the steps end."""
    keeper = MemoryKeeper()
    fit(backbone, settings(steps=steps, cool=3, validate_every=5, patience=9), keeper=keeper)
    assert keeper.state is not None
    assert keeper.state["step"].tolist() == [taken] * 3
