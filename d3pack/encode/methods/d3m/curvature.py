"""How far to move along a gradient: a damped natural gradient, from gradients of single samples.

The values of a prompt matter very unequally to the backbone, and not along their own axes, so steps
of equal length spend most samples on directions that hardly count. The outer products of single
gradients add up to the empirical Fisher matrix (Amari, "Natural gradient works efficiently in
learning", 1998). Where the error that is left is white noise of the images, that is the curvature
of the mean error, and the step Newton's; smooth errors make it larger, and steps shorter. One row
draws too few samples to know a matrix, so all rows add to one, for each place among the vectors of
a prompt; vectors wider than `WIDEST` are cut into blocks of equal width, whose matrices are solved
alone, since work grows with the third power of the width.

Rows also share part of their way: what the captions of a backbone leave out of one class, they
leave out of all. The mean gradient comes from the samples of every row, so it may be followed into
directions where a row's own gradient is mostly noise. A row takes that part only where it leads
downhill by the row's own gradient, and the whole step does; else it follows its own alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WIDEST = 1024  # values that one matrix has rows for
MEMORY = 10  # samples that are remembered, in units of a vector's length; older ones fade
# added to the curvature in all directions, in units of its mean, over the samples behind a gradient
OWN = 12.0  # for what a row's gradient has of its own
SHARED = 6.0  # for what the gradients of all rows agree on
TRUST = 0.5  # the longest step, in units of the start vectors' root mean square


class Curvature:
    """One matrix for each block of each of the k vectors, in arrays that the caller keeps."""

    def __init__(self, matrices: Array, seen: Array) -> None:
        self.matrices, self.seen = matrices, seen

    @classmethod
    def unknown(cls, k: int, dim: int) -> Curvature:
        """Return the curvature before the first sample."""
        blocks = next(count for count in range(-(-dim // WIDEST), dim + 1) if dim % count == 0)
        return cls(np.zeros((k * blocks, dim // blocks, dim // blocks)), np.zeros(1))

    def learn(self, gradients: Array, losses: Array, weights: Array, values: int) -> None:
        """Add gradients (R, S, k, D) of S samples a row; a loss is a mean over so many values."""
        rows, each, _, _ = gradients.shape
        parts, dim, _ = self.matrices.shape
        count = rows * each
        # what all samples of a row agree on is no noise, and would look like a steep direction
        shares = weights / weights.sum(1, keepdims=True)
        scale = weights * values / (2 * np.maximum(losses, 1e-12))
        apart = gradients
        if each > 1:
            apart = gradients - np.einsum("rs,rskd->rkd", shares, gradients)[:, None]
            scale = scale / (1 - np.square(shares).sum(1, keepdims=True))
        flat = apart.reshape(count, parts, dim).transpose(1, 0, 2)
        kept = (1 - 1 / (MEMORY * dim)) ** count
        self.matrices *= kept
        self.matrices += (flat * scale.reshape(count, 1)).transpose(0, 2, 1) @ flat
        self.seen *= kept
        self.seen += count

    def steps(self, gradients: Array, each: int) -> Array:
        """Return steps of rows (R, k, D) against gradients that are means over `each` samples.

        Damping accounts for the noise of a gradient; what all rows agree on has less of it. No row
        steps uphill by its own gradient.
        """
        rows, k, _ = gradients.shape
        mean = gradients.mean(0, keepdims=True)
        shared = self._damped(mean, SHARED / (each * rows))
        together = self._damped(gradients - mean, OWN / each) + shared
        along = np.einsum("rkd,kd->r", gradients, shared[0])
        apart = (along >= 0) | (np.einsum("rkd,rkd->r", gradients, together) >= 0)
        if apart.any():
            together[apart] = self._damped(gradients[apart], OWN / each)
        # each place steps as if it were alone; k of them may all have the same aim
        steps: Array = together / k
        return steps

    def _damped(self, gradients: Array, damping: float) -> Array:
        """Against gradients (R, k, D), by the damped inverse of the curvature of each block."""
        rows, k, _ = gradients.shape
        parts, dim, _ = self.matrices.shape
        matrices = self.matrices / max(1.0, float(self.seen[0]))
        traces = np.trace(matrices, axis1=1, axis2=2).reshape(k, -1)
        mean = (traces.mean(1) / dim).repeat(parts // k)
        if not (mean > 0).all():  # nothing matters, or nothing is known
            return np.zeros_like(gradients)
        # until there is a sample for each value, the mean over all directions is known best
        ridge = mean * (damping + dim / float(self.seen[0]))
        damped = matrices + ridge[:, None, None] * np.eye(dim)
        wanted = gradients.reshape(rows, parts, dim).transpose(1, 2, 0)
        solved: Array = np.linalg.solve(damped, wanted).transpose(2, 0, 1)
        return -solved.reshape(gradients.shape)
