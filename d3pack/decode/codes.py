"""The noise that codes choose: signed sums of codebook entries, in place of fresh noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from d3pack.decode import noise

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format import Array, Coding


def codebook(seed: int, level: int, atoms: Any, shape: tuple[int, ...], device: Any) -> Tensor:
    """Return entries of the codebook of a level: noise, with their number in the counter."""
    draw = noise.EPOCHS * noise.STEPS + level  # in the last epoch of the counter
    return noise.normal_torch(seed, 0, atoms, shape, draw, device)


def chosen_noise(
    seed: int, coding: Coding, level: int, atoms: Array, signs: Array, shape: Any, device: Any
) -> Tensor:
    """Return the noise (B, *shape) of one level of codes (B, atoms of all levels).

    Atoms are added one after another, and divided by the root of their number, which keeps the
    variance at 1: no sum over the latent is taken, so nothing depends on the device.
    """
    import torch

    first, count = sum(coding.atoms[:level]), coding.atoms[level]
    total: Tensor | None = None
    for at in range(first, first + count):
        sign = torch.from_numpy(signs[:, at].astype(np.float32)).to(device)
        atom = codebook(seed, level, atoms[:, at], tuple(shape), device)
        atom = atom * sign.reshape(-1, *[1] * len(shape))
        total = atom if total is None else total + atom
    assert total is not None, "a level without atoms has fresh noise"
    return total if count == 1 else total * (1 / math.sqrt(count))
