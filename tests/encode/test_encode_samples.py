"""Samples of a row: their noise levels, their targets, and what is drawn for which step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_sd

from d3pack.backbones import Backbone, Levels, open_backbone
from d3pack.backbones.levels import PREDICTIONS, VELOCITY
from d3pack.encode.methods.d3m.samples import (
    BINS,
    FLOOR,
    Density,
    Draws,
    Samples,
    expected_target,
    pick,
    split_latents,
)

SHAPE = (4, 8, 8)
LOUD = Density.of_squares(np.geomspace(1, 100, BINS))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return open_backbone(str(tiny_sd(tmp_path_factory.mktemp("b") / "sd")))


def latents(row: int) -> np.ndarray:
    rng = np.random.default_rng(row)
    return (rng.standard_normal((10, *SHAPE)) * 0.3 + row).astype(np.float16)


def seated(backbone: Backbone, *rows: int) -> Draws:
    found = Draws(backbone, latents, seed=7, triples=6)
    for row in rows:
        found.seat(row)
    return found


def equal(one: Samples, other: Samples) -> bool:
    tensors = ("x_t", "t", "target")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and np.array_equal(one.weights, other.weights)


def test_draw_does_not_depend_on_other_rows(backbone: Backbone) -> None:
    alone, beside = seated(backbone, 1), seated(backbone, 0, 1)
    beside.step(0, 3, 4, LOUD)
    beside.triples(0, LOUD)
    assert equal(alone.step(1, 3, 4, LOUD), beside.step(1, 3, 4, LOUD))
    assert equal(alone.triples(1, LOUD), beside.triples(1, LOUD))
    assert equal(alone.pilot(1, 2), beside.pilot(1, 2))
    assert not equal(alone.step(1, 3, 4, LOUD), alone.step(1, 4, 4, LOUD))
    assert not equal(beside.step(0, 3, 4, LOUD), beside.step(1, 3, 4, LOUD))


def test_row_that_left_draws_the_same_when_it_is_back(backbone: Backbone) -> None:
    draws = seated(backbone, 0, 1)
    before = draws.triples(1, LOUD)
    draws.leave(1)
    assert draws.seated == {0}
    draws.seat(1)
    assert draws.triples(1, LOUD) is not before
    assert equal(draws.triples(1, LOUD), before)


def test_weights_undo_the_density(backbone: Backbone) -> None:
    """Over many steps each level counts alike, however often it is looked at."""
    draws, rows = seated(backbone, 0, 1, 2), range(3)
    steps = Samples.joined([draws.step(r, step, 10, LOUD) for r in rows for step in range(100)])
    levels = steps.t.numpy() * BINS // len(backbone.levels.alphas_cumprod)
    looks = np.bincount(levels, minlength=BINS)
    assert looks[-1] > 3 * looks[0]
    counts = np.bincount(levels, steps.weights, minlength=BINS)
    assert np.allclose(counts, 300, rtol=0.25)


def test_pilot_samples_every_tenth_equally(backbone: Backbone) -> None:
    pilot = seated(backbone, 0).pilot(0, 3)
    levels = pilot.t.numpy() * BINS // len(backbone.levels.alphas_cumprod)
    assert np.bincount(levels, minlength=BINS).tolist() == [3] * BINS
    assert (pilot.weights == 1).all()


def test_split_samples_join_to_the_same(backbone: Backbone) -> None:
    whole = seated(backbone, 0).pilot(0, 1)
    parts = list(whole.split(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert equal(Samples.joined(parts), whole)
    assert whole.values == np.prod(SHAPE)


def test_latents_are_split_for_training_and_validation() -> None:
    training, validation = split_latents(1)
    assert training.tolist() == validation.tolist() == [0]
    training, validation = split_latents(20)
    assert len(validation) == 4
    assert not set(training.tolist()) & set(validation.tolist())
    assert len(training) + len(validation) == 20


def test_every_latent_is_picked_once_before_any_again() -> None:
    drawn = np.concatenate([pick(5, step, 4, 0, 2) for step in range(10)])
    for epoch in range(8):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == list(range(5))


# -- density of noise levels -------------------------------------------------------------------

SQUARES = np.linspace(0.1, 4.0, BINS) ** 2


def test_weighted_means_are_unbiased() -> None:
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000
    places, weights = Density.of_squares(SQUARES).place(grid)
    assert abs(weights.mean() - 1) < 1e-4
    for curve in (np.sin, np.square, np.exp):
        assert abs((weights * curve(places)).mean() - curve(grid).mean()) < 1e-4


def test_density_lowers_the_variance() -> None:
    density = Density.of_squares(SQUARES)
    rng = np.random.default_rng(0)
    loud = np.sqrt(SQUARES)

    def noise(places: np.ndarray) -> np.ndarray:
        heard: np.ndarray = loud[(places * BINS).astype(int)] * rng.standard_normal(len(places))
        return heard

    places, weights = density.place(rng.random(100_000))
    assert (noise(places) * weights).std() < 0.9 * noise(rng.random(100_000)).std()


def test_every_level_is_drawn_and_weights_are_bounded() -> None:
    squares = np.zeros(BINS)
    squares[-1] = 1.0
    places, weights = Density.of_squares(squares).place(np.linspace(0, 1, 10_001))
    assert places.min() >= 0
    assert places.max() < 1
    assert (np.histogram(places, BINS, (0, 1))[0] > 0).all()
    assert weights.max() <= 1 / FLOOR + 1e-9


def test_density_without_gradients_is_even() -> None:
    assert np.array_equal(Density.of_squares(np.zeros(BINS)).shares, Density.even().shares)


# -- expected targets --------------------------------------------------------------------------

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SMALL = (4, 4, 4)


def levels_of(prediction: str) -> Levels:
    if prediction == VELOCITY:
        return Levels.flow(3.0)
    return Levels.from_config({**SCHEDULE, "prediction_type": prediction})


def draw(count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(count, *SMALL, generator=rng)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, VELOCITY])
def test_expected_target_is_the_mean_by_likelihood(prediction: str) -> None:
    levels, rng = levels_of(prediction), torch.Generator().manual_seed(0)
    latents = draw(7, rng)
    x0, eps = latents[[2, 5, 5]], draw(3, rng)
    t = torch.tensor([999, 900, 300])
    x_t, found = expected_target(levels, x0, eps, t, latents)
    assert torch.equal(x_t, levels.noised(x0, eps, t))
    for i in range(3):
        of_x0, of_eps = (float(power[t[i]]) for power in levels.powers)
        noises = (x_t[i].double() - of_x0**0.5 * latents.double()) / of_eps**0.5
        normal = torch.distributions.Normal(0.0, 1.0)
        logs = normal.log_prob(noises).sum((1, 2, 3))
        shares = (logs - logs.logsumexp(0)).exp()
        one = levels.target(latents, noises.float(), t[i].expand(7))
        wanted = (shares[:, None, None, None] * one).sum(0)
        assert torch.allclose(found[i], wanted.float(), atol=2e-4)
    # far apart and little noise: no other image could have been there
    sure = levels.target(x0, eps, t)[2]
    assert torch.allclose(found[2], sure, atol=1e-3)
    assert not torch.allclose(found[0], levels.target(x0, eps, t)[0], atol=1e-2)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, VELOCITY])
def test_expected_target_of_one_image_is_its_own(prediction: str) -> None:
    levels, rng = levels_of(prediction), torch.Generator().manual_seed(1)
    latents, eps, t = draw(1, rng), draw(4, rng), torch.tensor([0, 10, 500, 999])
    x0 = latents.expand(4, *SMALL)
    _, found = expected_target(levels, x0, eps, t, latents)
    assert torch.allclose(found, levels.target(x0, eps, t), atol=1e-4)


def test_expected_targets_keep_the_mean_and_lower_the_variance() -> None:
    """Of a product with any function of what the model sees, as a gradient is one."""
    levels, rng = levels_of("v_prediction"), torch.Generator().manual_seed(2)
    latents, count = draw(8, rng), 40_000
    x0, eps = latents[torch.arange(count) % 8], draw(count, rng)
    t = torch.full((count,), 850)
    x_t, averaged = expected_target(levels, x0, eps, t, latents)
    single = levels.target(x0, eps, t)
    probe = torch.tanh(x_t)
    plain = (single * probe).sum((1, 2, 3))
    quiet = (averaged * probe).sum((1, 2, 3))
    error = (plain - quiet).std() / count**0.5
    assert abs(float(plain.mean() - quiet.mean())) < 4 * float(error)
    assert (single - averaged).square().mean() > 0.05 * single.var()
    assert averaged.var() < single.var()
