"""The noise of the format: integers and one table, so that every device makes equal bits.

Philox4x32-10 with the pack's seed as key turns the counter (draw, class, image, block) into eight
16-bit words, and each word picks one of 65,536 quantiles of the normal distribution. No function of
a real number is evaluated, so nothing can round differently on another machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from d3pack.errors import D3MError, UsageError
from d3pack.format import Array

if TYPE_CHECKING:
    from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORDS = 8  # normals out of one block
STEPS = 256  # draws of one epoch: 0 starts the image, 1, 2, ... are noise added on the way
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
EPOCHS = 2**32 // STEPS - 1  # of images; one more, the last, holds the codebooks
CHUNK = 1 << 14  # blocks at a time on a CPU, which stay in a core's cache
CHUNK_DEVICE = 1 << 20  # and on an accelerator, which keep it busy


def draw_number(step: int, epoch: int = 0) -> int:
    """Return the draw word of the counter: every epoch has its own noise."""
    if not 0 <= step < STEPS or not 0 <= epoch < EPOCHS:
        raise UsageError(
            f"step {step} of epoch {epoch} has no noise", hint="256 steps, 2**24 - 1 epochs"
        )
    return epoch * STEPS + step


def normal(seed: int, classes: Any, images: Any, shape: tuple[int, ...], draw: int = 0) -> Array:
    """Return standard normal float32 (B, *shape); row b is for image images[b] of classes[b]."""
    rows, columns = _pairs(seed, classes, images, draw)
    size = math.prod(shape)
    blocks = -(-size // WORDS)
    out = np.empty((len(rows), blocks * WORDS), dtype=np.float32)
    start, block = np.full(1, draw, dtype=np.uint64), np.arange(blocks, dtype=np.uint64)
    step = max(1, CHUNK // max(blocks, 1))
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        # broadcast, because the first two rounds do not combine rows with blocks yet
        counter = (start, rows[part, None], columns[part, None], block)
        words = np.stack(philox(counter, seed), axis=-1, dtype="<u4", casting="unsafe").view("<u2")
        out[at : at + step] = table()[words.reshape(words.shape[0], -1)]
    return out[:, :size].reshape(len(rows), *shape)


def normal_torch(
    seed: int, classes: Any, images: Any, shape: tuple[int, ...], draw: int = 0, device: Any = "cpu"
) -> Tensor:
    """Return the same noise as `normal`, bit for bit, made on a torch device."""
    import torch

    rows, columns = _pairs(seed, classes, images, draw)
    size = math.prod(shape)
    blocks = -(-size // WORDS)
    start = torch.full((1,), draw, dtype=torch.int64, device=device)
    device = start.device  # with its index
    # one copy, because on CUDA each waits for earlier work
    words = torch.from_numpy(np.stack([rows, columns]).astype(np.int64)).to(device)
    quantiles = _table_torch(str(device))
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    parts = []
    chunk = CHUNK if start.device.type == "cpu" else CHUNK_DEVICE
    step = max(1, chunk // max(blocks, 1))
    for at in range(0, len(rows), step):
        row, column = words[:, at : at + step, None]
        drawn = _philox_torch((start, row, column, block), seed)
        halves = torch.stack(
            [half for word in drawn for half in (word & 0xFFFF, word >> 16)], dim=-1
        )
        parts.append(quantiles[halves.flatten(1)][:, :size])
    return (
        torch.cat(parts).reshape(len(rows), *shape)
        if parts
        else torch.empty(0, *shape, device=device)
    )


def philox(counter: Sequence[Array], seed: int) -> tuple[Array, Array, Array, Array]:
    """Return Philox4x32-10 of 32-bit words in uint64; the key is the seed, low word first."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        a, b = x0 * np.uint64(M0), x2 * np.uint64(M1)
        x0 = (b >> half) ^ x1 ^ np.uint64(k0)
        x2 = (a >> half) ^ x3 ^ np.uint64(k1)
        x1, x3 = b & mask, a & mask
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return x0, x1, x2, x3


@lru_cache(maxsize=1)
def table() -> Array:
    """Return the quantiles at (i + 1/2) / 65536, float32; the file holds the upper half of them."""
    stored = resources.files("d3pack.decode").joinpath("normal16.f32").read_bytes()
    upper = np.frombuffer(stored, "<f4")
    quantiles = np.concatenate([-upper[::-1], upper])
    if hashlib.sha256(quantiles.astype("<f4").tobytes()).hexdigest() != TABLE_SHA256:
        raise D3MError("the table of normal quantiles is damaged", hint="install d3pack again")
    quantiles.flags.writeable = False
    return quantiles


@lru_cache(maxsize=8)
def _table_torch(device: str) -> Tensor:
    import torch

    return torch.from_numpy(table().copy()).to(device)


def _philox_torch(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    x0, x1, x2, x3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(x0, M0)
        high_b, low_b = _multiply(x2, M1)
        x0, x1, x2, x3 = high_b ^ x1 ^ k0, low_b, high_a ^ x3 ^ k1, low_a
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return x0, x1, x2, x3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return high and low words of a product of 32-bit words; torch has no uint64."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _pairs(seed: int, classes: Any, images: Any, draw: int) -> tuple[Array, Array]:
    rows = np.atleast_1d(np.asarray(classes, dtype=np.int64))
    columns = np.atleast_1d(np.asarray(images, dtype=np.int64))
    rows, columns = np.broadcast_arrays(rows, columns)
    for what, low, high in (
        ("class", rows.min(initial=0), rows.max(initial=0)),
        ("image", columns.min(initial=0), columns.max(initial=0)),
        ("draw", draw, draw),
    ):
        if low < 0 or high >= 2**32:
            raise UsageError(f"noise: {what} {low if low < 0 else high} is not a 32-bit word")
    if not 0 <= seed < 2**64:
        raise UsageError(f"noise: seed {seed} is not an unsigned 64-bit integer")
    return rows.astype(np.uint64), columns.astype(np.uint64)
