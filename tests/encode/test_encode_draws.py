"""What a row looks at: apart for steps and judge, the same whenever it is asked, in fair turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_sd

from d3pack.backbones import Backbone, open_backbone
from d3pack.encode.methods.d3m.density import BINS, Density
from d3pack.encode.methods.d3m.draws import Draws, Samples, judge_latents, pick

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


def test_a_draw_is_the_same_whoever_else_is_there(backbone: Backbone) -> None:
    alone, beside = seated(backbone, 1), seated(backbone, 0, 1)
    beside.step(0, 3, 4, LOUD)
    beside.triples(0, LOUD)
    assert equal(alone.step(1, 3, 4, LOUD), beside.step(1, 3, 4, LOUD))
    assert equal(alone.triples(1, LOUD), beside.triples(1, LOUD))
    assert equal(alone.pilot(1, 2), beside.pilot(1, 2))
    assert not equal(alone.step(1, 3, 4, LOUD), alone.step(1, 4, 4, LOUD))
    assert not equal(beside.step(0, 3, 4, LOUD), beside.step(1, 3, 4, LOUD))


def test_a_row_that_left_is_forgotten_and_comes_back_the_same(backbone: Backbone) -> None:
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


def test_pilot_looks_at_every_tenth_alike(backbone: Backbone) -> None:
    pilot = seated(backbone, 0).pilot(0, 3)
    levels = pilot.t.numpy() * BINS // len(backbone.levels.alphas_cumprod)
    assert np.bincount(levels, minlength=BINS).tolist() == [3] * BINS
    assert (pilot.weights == 1).all()


def test_parts_are_the_whole(backbone: Backbone) -> None:
    whole = seated(backbone, 0).pilot(0, 1)
    parts = list(whole.split(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert equal(Samples.joined(parts), whole)
    assert whole.values == np.prod(SHAPE)


def test_a_single_latent_trains_and_judges() -> None:
    train, judging = judge_latents(1)
    assert train.tolist() == judging.tolist() == [0]
    train, judging = judge_latents(20)
    assert len(judging) == 4
    assert not set(train.tolist()) & set(judging.tolist())
    assert len(train) + len(judging) == 20


def test_every_latent_comes_once_before_any_comes_again() -> None:
    drawn = np.concatenate([pick(5, step, 4, 0, 2) for step in range(10)])
    for epoch in range(8):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == list(range(5))
