"""Curvature from single gradients: what it estimates, where its steps lead, what they ignore."""

from __future__ import annotations

import numpy as np
import pytest

from d3pack.encode.methods.d3m import curvature
from d3pack.encode.methods.d3m.curvature import MEMORY, OWN, SHARED, Curvature

DIM, VALUES = 12, 100  # of a vector, and of what a sample is compared on


class Line:
    """Samples A v* + noise and a model that says A v; its directions matter very unequally."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.turn = np.linalg.qr(self.rng.standard_normal((DIM, DIM)))[0]
        self.root = self.turn * np.geomspace(1.0, 0.05, DIM) @ self.turn.T
        self.best = self.rng.standard_normal(DIM)
        self.hessian = 2 * self.root @ self.root  # of the mean squared error

    def samples(self, rows: int, each: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(gradients, losses) of single samples."""
        maps = self.rng.standard_normal((rows, each, VALUES, DIM)) @ self.root
        left = maps @ (at - self.best) + self.rng.standard_normal((rows, each, VALUES))
        gradients = 2 / VALUES * np.einsum("rsnd,rsn->rsd", maps, left)
        return gradients[:, :, None], np.square(left).mean(2)

    def excess(self, at: np.ndarray) -> float:
        """Of the mean squared error, over the best there is."""
        return float(np.square(self.root @ (at - self.best)).sum())


def learned(line: Line, rows: int, at: np.ndarray) -> Curvature:
    found = Curvature.unknown(1, DIM)
    found.learn(*line.samples(rows, 10, at), np.ones((rows, 10)), VALUES)
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("away", [0.0, 0.2])
def test_curvature_is_the_hessian_of_the_mean_error(
    monkeypatch: pytest.MonkeyPatch, away: float
) -> None:
    """Also away from the best vectors, where all samples pull one way."""
    monkeypatch.setattr(curvature, "MEMORY", 1e9)
    line = Line(0)
    found = learned(line, 2000, line.best * (1 - away))
    assert found.seen[0] == pytest.approx(20_000, rel=1e-4)
    off = found.matrices[0] / found.seen - line.hessian
    assert np.linalg.norm(off) < 0.1 * np.linalg.norm(line.hessian)


def test_single_samples_of_many_rows_are_enough() -> None:
    line, found = Line(0), Curvature.unknown(1, DIM)
    found.learn(*line.samples(100, 1, line.best), np.ones((100, 1)), VALUES)
    off = found.matrices[0] / found.seen - line.hessian
    assert np.linalg.norm(off) < 0.5 * np.linalg.norm(line.hessian)


def test_sample_counts_by_its_weight() -> None:
    """Rare samples that stand for many beside many that stand for few."""
    line = Line(1)
    gradients, losses = line.samples(2000, 10, line.best)
    gradients[:, :2] *= 3  # nine times the curvature
    weights = np.tile([2.0] * 2 + [0.5] * 8, (2000, 1))
    one, other = Curvature.unknown(1, DIM), Curvature.unknown(1, DIM)
    one.learn(gradients, losses, np.ones((2000, 10)), VALUES)
    other.learn(gradients, losses, weights, VALUES)
    expected = (0.2 * 2.0 * 9 + 0.8 * 0.5) / (0.2 * 9 + 0.8)
    found = np.trace(other.matrices[0]) / np.trace(one.matrices[0])
    assert found == pytest.approx(expected, rel=0.1)


def test_few_steps_reach_more_than_plain_descent() -> None:
    line = Line(2)
    start = np.zeros(DIM)
    found = learned(line, 20, start)
    newton, plain = start.copy(), start.copy()
    for step in range(60):
        rate = 1 - step / 60
        gradients, losses = line.samples(1, 10, newton)
        found.learn(gradients, losses, np.ones((1, 10)), VALUES)
        newton += rate * found.steps(gradients.mean(1), 10)[0, 0]
        gradients, _ = line.samples(1, 10, plain)
        plain -= rate * 0.5 * gradients.mean(1)[0, 0]  # as long as the steepest direction allows
    assert line.excess(newton) < 0.05 * line.excess(start)
    assert line.excess(newton) < 0.5 * line.excess(plain)


def test_steps_turn_with_the_axes() -> None:
    line = Line(3)
    turn = np.linalg.qr(line.rng.standard_normal((DIM, DIM)))[0]
    gradients, losses = line.samples(5, 10, np.zeros(DIM))
    one, turned = Curvature.unknown(1, DIM), Curvature.unknown(1, DIM)
    one.learn(gradients, losses, np.ones((5, 10)), VALUES)
    turned.learn(gradients @ turn, losses, np.ones((5, 10)), VALUES)
    mean = gradients.mean(1)
    assert np.allclose(turned.steps(mean @ turn, 10), one.steps(mean, 10) @ turn, rtol=1e-9)


def damped_inverse(found: Curvature, damping: float) -> np.ndarray:
    """Of one place, damped by so many mean curvatures."""
    matrix = found.matrices[0] / found.seen[0]
    ridge = np.trace(matrix) / DIM * (damping + DIM / found.seen[0])
    return np.linalg.inv(matrix + ridge * np.eye(DIM))


@pytest.mark.parametrize("each", [1, 4])
def test_step_is_damped_by_its_samples(each: int) -> None:
    """The same one for rows that agree, and less than that for what each has of its own."""
    line = Line(4)
    found = learned(line, 50, line.best)
    agreed = np.tile(line.rng.standard_normal(DIM) * 9, (3, 1, 1))  # outweighs what follows
    together = -agreed[:, 0] @ damped_inverse(found, SHARED / (3 * each))
    assert np.allclose(found.steps(agreed, each)[:, 0], together)
    own = line.rng.standard_normal((3, 1, DIM))
    own -= own.mean(0)
    alone = -own[:, 0] @ damped_inverse(found, OWN / each)
    assert np.allclose(found.steps(own, each)[:, 0], alone)
    assert np.allclose(found.steps(agreed + own, each)[:, 0], together + alone)


def test_no_row_steps_uphill_by_its_own_gradient() -> None:
    """The direction that all rows but one agree on is no use to the one that has to go back."""
    line = Line(8)
    found = learned(line, 50, line.best)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gradients = np.tile(rng.standard_normal(DIM), (10, 1, 1))
        gradients += 0.2 * rng.standard_normal(gradients.shape)
        gradients[3] = -0.05 * gradients.mean(0)  # nearly there, and past it
        gradients[7] = 0  # there
        steps = found.steps(gradients, 4)
        alone = -gradients[:, 0] @ damped_inverse(found, OWN / 4)
        shared = gradients.mean(0)
        agreed = -shared @ damped_inverse(found, SHARED / 40)
        together = agreed - (gradients - shared)[:, 0] @ damped_inverse(found, OWN / 4)
        products = np.einsum("rd,rd->r", gradients[:, 0], together)
        along = gradients[:, 0] @ agreed[0]
        assert (np.einsum("rkd,rkd->r", gradients, steps) <= 0).all()
        assert products[3] > 0
        uphill = (products >= 0) | (along >= 0)
        assert np.allclose(steps[:, 0], np.where(uphill[:, None], alone, together))
        assert not steps[7].any()
        assert not uphill[[0, 1, 2]].all()


def test_rows_learn_what_they_share_faster_together() -> None:
    """Ten rows that all want the same, from a sample each and step, beside a row by itself."""
    left = {}
    for rows in (1, 10):
        line = Line(7)
        at, found = np.zeros((rows, 1, DIM)), learned(line, 100, np.zeros(DIM))
        for step in range(40):
            gradients = np.stack([line.samples(1, 1, row[0])[0][0] for row in at])
            at += (1 - step / 40) * found.steps(gradients.mean(1), 1)
        left[rows] = float(np.mean([line.excess(row[0]) for row in at]))
    assert left[10] < 0.5 * left[1]


def test_old_samples_are_forgotten() -> None:
    line, found = Line(5), Curvature.unknown(1, DIM)
    rows = 4 * MEMORY * DIM
    gradients, losses = line.samples(rows, 10, line.best)
    for row in range(rows):
        loud = 100.0 if row < rows / 2 else 1.0
        part = slice(row, row + 1)
        found.learn(loud * gradients[part], losses[part], np.ones((1, 10)), VALUES)
    assert found.seen[0] == pytest.approx(MEMORY * DIM, rel=0.1)
    off = np.trace(found.matrices[0]) / found.seen[0] / np.trace(line.hessian)
    assert off == pytest.approx(1, abs=0.3)  # with nothing forgotten it would be 5,000


def test_each_vector_has_its_own_curvature() -> None:
    line, twice = Line(6), Curvature.unknown(2, DIM)
    gradients, losses = line.samples(30, 10, line.best)
    both = np.concatenate([gradients, 2 * gradients], 2)
    twice.learn(both, losses, np.ones((30, 10)), VALUES)
    alone = Curvature.unknown(1, DIM)
    alone.learn(gradients, losses, np.ones((30, 10)), VALUES)
    mean = gradients.mean(1)
    found = twice.steps(np.concatenate([mean, mean], 1), 10)
    assert np.allclose(found[:, 0], alone.steps(mean, 10)[:, 0] / 2)
    assert np.allclose(found[:, 1], found[:, 0] / 4)


def test_unknown_curvature_gives_no_step() -> None:
    found = Curvature.unknown(2, DIM)
    gradient = np.ones((3, 2, DIM))
    assert not found.steps(gradient, 4).any()
    found.learn(np.zeros((5, 4, 2, DIM)), np.zeros((5, 4)), np.ones((5, 4)), VALUES)
    assert not found.steps(gradient, 4).any()


def test_wide_vectors_are_cut_into_equal_blocks() -> None:
    for dim, blocks in ((1024, 1), (2048, 2), (2304, 3), (2560, 4), (7680, 8), (1031, 1031)):
        assert Curvature.unknown(2, dim).matrices.shape == (
            2 * blocks,
            dim // blocks,
            dim // blocks,
        )


def test_blocks_step_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a block that does not depend on it, a block steps as a vector of its own width."""
    rng = np.random.default_rng(5)
    gradients, losses = rng.standard_normal((4, 10, 2, DIM)), np.ones((4, 10))
    monkeypatch.setattr(curvature, "WIDEST", DIM // 2)
    cut = Curvature.unknown(2, DIM)
    assert cut.matrices.shape == (4, DIM // 2, DIM // 2)
    cut.learn(gradients, losses, losses, VALUES)
    alone = Curvature.unknown(4, DIM // 2)
    alone.learn(gradients.reshape(4, 10, 4, DIM // 2), losses, losses, VALUES)
    np.testing.assert_array_equal(cut.matrices, alone.matrices)
    steps = cut.steps(gradients.mean(1), 10)
    assert steps.shape == (4, 2, DIM)
    assert (np.einsum("rkd,rkd->r", gradients.mean(1), steps) <= 0).all()
    matrices = cut.matrices / cut.seen
    mean = np.trace(matrices, axis1=1, axis2=2).reshape(2, 2).mean(1).repeat(2) / (DIM // 2)
    ridge = mean * (OWN / 10 + DIM // 2 / cut.seen[0])
    inverse = np.linalg.inv(matrices + ridge[:, None, None] * np.eye(DIM // 2))
    parts = gradients.mean(1).reshape(4, 4, DIM // 2)
    wanted = -np.einsum("pde,rpe->rpd", inverse, parts).reshape(4, 2, DIM)
    np.testing.assert_allclose(cut._damped(gradients.mean(1), OWN / 10), wanted, rtol=1e-9)


def test_blocks_still_reach_more_than_plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "WIDEST", DIM // 2)
    line, at = Line(2), np.zeros(DIM)
    first = line.excess(at)
    found = learned(line, 20, at)
    for _ in range(10):
        gradients, _ = line.samples(1, 10, at)
        at = at + found.steps(gradients.mean(1), 10)[0, 0]
    assert line.excess(at) < 0.2 * first
