"""The density of timesteps: weights that take back what the drawing has done."""

from __future__ import annotations

import numpy as np

from d3pack.encode.methods.d3m.density import BINS, FLOOR, Density

SQUARES = np.linspace(0.1, 4.0, BINS) ** 2


def test_weighted_means_are_plain_means() -> None:
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000
    places, weights = Density.of_squares(SQUARES).place(grid)
    assert abs(weights.mean() - 1) < 1e-4
    for curve in (np.sin, np.square, np.exp):
        assert abs((weights * curve(places)).mean() - curve(grid).mean()) < 1e-4


def test_the_variance_falls() -> None:
    density = Density.of_squares(SQUARES)
    rng = np.random.default_rng(0)
    loud = np.sqrt(SQUARES)

    def noise(places: np.ndarray) -> np.ndarray:
        return loud[(places * BINS).astype(int)] * rng.standard_normal(len(places))

    places, weights = density.place(rng.random(100_000))
    assert (noise(places) * weights).std() < 0.9 * noise(rng.random(100_000)).std()


def test_every_level_is_drawn_and_none_weighs_too_much() -> None:
    squares = np.zeros(BINS)
    squares[-1] = 1.0
    places, weights = Density.of_squares(squares).place(np.linspace(0, 1, 10_001))
    assert places.min() >= 0
    assert places.max() < 1
    assert (np.histogram(places, BINS, (0, 1))[0] > 0).all()
    assert weights.max() <= 1 / FLOOR + 1e-9


def test_silence_is_even() -> None:
    assert np.array_equal(Density.of_squares(np.zeros(BINS)).shares, Density.even().shares)
