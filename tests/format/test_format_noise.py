"""Noise: the known answers of Random123, equal bits in NumPy and torch, and the statistics."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from d3pack.decode import noise
from d3pack.errors import UsageError

# Random123 1.14, kat_vectors, philox4x32 10: counter, key, answer.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_known_answers(counter: Any, key: Any, answer: Any) -> None:
    torch = pytest.importorskip("torch")
    seed = key[0] | key[1] << 32
    words = noise.philox(list(np.array(counter, dtype=np.uint64)[:, None]), seed)
    assert tuple(int(word[0]) for word in words) == answer
    tensors = noise._philox_torch(tuple(torch.tensor([word]) for word in counter), seed)
    assert tuple(int(word) for word in tensors) == answer


def test_table_of_quantiles_matches_its_procedure() -> None:
    """NormalDist is good to 1e-15 or so; no quantile is that near to a rounding boundary."""
    table = noise.table()
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == noise.TABLE_SHA256
    upper = [NormalDist().inv_cdf(0.5 + (2 * i + 1) / 131072) for i in range(32768)]
    exact = np.array(upper)
    assert (exact.astype(np.float32) == table[32768:]).all()
    assert (-table[32767::-1] == table[32768:]).all()
    near = np.array([np.nextafter(table[32768:], s, dtype=np.float32) for s in (-np.inf, np.inf)])
    middle = (near.astype(np.float64) + table[32768:].astype(np.float64)) / 2
    assert (np.abs(middle - exact) / exact).min() > 1e-12
    assert not table.flags.writeable


@pytest.mark.slow
def test_documented_procedure_gives_the_pinned_hash() -> None:
    script = ROOT / "spec" / "normal_table.py"
    got = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert noise.TABLE_SHA256 in got.stdout


def by_hand(seed: int, c: int, i: int, draw: int, size: int) -> list[float]:
    """The definition, element by element, with Python's own integers."""
    out: list[float] = []
    for block in range(-(-size // 8)):
        x, k = [draw, c, i, block], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        for word in x:
            out += [float(noise.table()[word & 0xFFFF]), float(noise.table()[word >> 16])]
    return out[:size]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1), st.integers(1, 40),
)  # fmt: skip
def test_noise_follows_its_definition(seed: int, c: int, i: int, draw: int, size: int) -> None:
    got = noise.normal(seed, [c], [i], (size,), draw)
    assert got.dtype == np.float32
    assert got[0].tolist() == by_hand(seed, c, i, draw, size)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1,), (4, 64, 64)])
def test_torch_noise_equals_numpy_noise(shape: tuple[int, ...]) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    classes, images = rng.integers(0, 2**32, 11), rng.integers(0, 2**32, 11)
    for seed, draw in ((0, 0), (2**64 - 1, 255), (2**63 + 12345, 2**32 - 1)):
        want = noise.normal(seed, classes, images, shape, draw)
        got = noise.normal_torch(seed, classes, images, shape, draw)
        assert got.shape == (11, *shape)
        assert (got.numpy().view(np.uint32) == want.view(np.uint32)).all()


def test_row_depends_on_its_own_counter_only(monkeypatch: Any) -> None:
    whole = noise.normal(9, np.arange(40), np.arange(40) * 3, (4, 8, 8))
    for row in (0, 17, 39):
        assert (noise.normal(9, row, row * 3, (4, 8, 8))[0] == whole[row]).all()
    monkeypatch.setattr(noise, "CHUNK", 64)
    assert (noise.normal(9, np.arange(40), np.arange(40) * 3, (4, 8, 8)) == whole).all()
    assert noise.normal(9, [], [], (4,)).shape == (0, 4)


def test_draws_of_epochs_do_not_overlap() -> None:
    numbers = {noise.draw_number(step, epoch) for step in range(256) for epoch in range(4)}
    assert len(numbers) == 1024
    assert noise.draw_number(0) == 0
    assert noise.draw_number(255, 2**24 - 2) == 2**32 - 257  # the codebooks follow
    for step, epoch in ((256, 0), (-1, 0), (0, 2**24), (0, -1), (0, 2**24 - 1)):
        with pytest.raises(UsageError):
            noise.draw_number(step, epoch)


def test_counters_out_of_range_are_refused() -> None:
    for seed, c, i, draw in (
        (-1, 0, 0, 0),
        (2**64, 0, 0, 0),
        (0, -1, 0, 0),
        (0, 0, 2**32, 0),
        (0, 0, 0, -1),
    ):
        with pytest.raises(UsageError):
            noise.normal(seed, [c], [i], (4,), draw)


SAMPLE = noise.normal(20240607, np.arange(64) // 8, np.arange(64) % 8, (4, 64, 64)).astype(
    np.float64
)


def test_noise_has_normal_moments() -> None:
    """Of a million values, each moment within five standard errors of the table's own."""
    n = SAMPLE.size
    table = noise.table().astype(np.float64)
    for power in (1, 2, 3, 4):
        want, spread = (table**power).mean(), (table**power).std()
        assert abs((SAMPLE**power).mean() - want) < 5 * spread / math.sqrt(n), power
    assert abs(table.var() - 1) < 1e-3
    assert abs((table**4).mean() - 3) < 0.01


def test_noise_passes_kolmogorov_smirnov() -> None:
    """Of the sample against the normal distribution; the table's steps add at most 2**-17."""
    x = np.sort(SAMPLE.ravel())
    n = len(x)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in noise.table()[::64].tolist()])
    below = np.searchsorted(x, noise.table()[::64].astype(np.float64), side="right") / n
    distance = np.abs(below - (1 + erf) / 2).max()
    assert distance < 1.95 / math.sqrt(n) + 2**-16, "p below 0.001"


def test_neighbouring_noise_does_not_correlate() -> None:
    """Images, classes, seeds, draws and pixels beside each other: within five standard errors."""
    flat = SAMPLE.reshape(64, -1)
    shape = (4, 64, 64)
    one = noise.normal(7, np.arange(16), np.zeros(16), shape).reshape(16, -1).astype(np.float64)
    pairs = {
        "images": (flat[:-1], flat[1:]),
        "classes": (one[:-1], one[1:]),
        "pixels": (SAMPLE[..., :-1], SAMPLE[..., 1:]),
        "rows": (SAMPLE[..., :-1, :], SAMPLE[..., 1:, :]),
        "channels": (SAMPLE[:, :-1], SAMPLE[:, 1:]),
        "halves of a word": (flat[:, 0::2], flat[:, 1::2]),
        "blocks": (flat[:, :-8], flat[:, 8:]),
    }
    for what, seeds in {
        "seeds": (7, 8),
        "high seeds": (7, 7 + 2**32),
        "far seeds": (7, 2**63),
    }.items():
        a, b = (noise.normal(seed, np.arange(16), 0, shape).astype(np.float64) for seed in seeds)
        pairs[what] = (a, b)
    for what, draws in {"draws": (0, 1), "epochs": (0, 256)}.items():
        a, b = (noise.normal(7, np.arange(16), 0, shape, d).astype(np.float64) for d in draws)
        pairs[what] = (a, b)
    for what, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size), what
        squares = ((a**2 - 1) * (b**2 - 1)).mean() / 2
        assert abs(squares) < 5 / math.sqrt(a.size), f"squares of {what}"


def test_every_entry_of_the_table_occurs() -> None:
    """Chi-square over 256 bins of the table."""
    order = np.searchsorted(noise.table(), SAMPLE.ravel().astype(np.float32)) >> 8
    count = np.bincount(order, minlength=256)
    expected = SAMPLE.size / 256
    chi = float(((count - expected) ** 2 / expected).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
