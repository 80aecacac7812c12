"""Curated seeds: which of its candidates an image is, in as many bits as tell them apart.

The candidates of a class are dealt out to L lanes in turn. Image j takes one from lane j mod L, and
its code says how far along that lane: candidate j mod L + code * L. One lane is a free choice among
all candidates; as many lanes as images let each image choose among a few of its own, for which
two or three bits are enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _bits
from d3pack.format.codecs import params as p
from d3pack.format.coded import Array, Coded

CODEC = "lanes"
MAX_BITS = 16


def encode_picks(index: Any, lanes: int = 1) -> Coded:
    """Store candidate numbers (classes, images), each of the lane of its image."""
    index = np.asarray(index)
    if index.ndim != 2 or index.dtype.kind not in "iu" or not index.size or index.min() < 0:
        raise UsageError("picks are natural numbers (classes, images)")
    images = index.shape[1]
    if lanes < 1:
        raise UsageError(f"{lanes} lanes", hint="one or more")
    codes, lane = np.divmod(index.astype(np.int64), lanes)
    if (lane != np.arange(images) % lanes).any():
        raise UsageError(f"a picked candidate is not of its image's lane, with {lanes} lanes")
    bits = max(1, int(codes.max()).bit_length())
    if bits > MAX_BITS:
        raise UsageError(f"more than {2**MAX_BITS} candidates a lane")
    return _coded(codes, bits, lanes)


def decode_picks(coded: Coded) -> Array:
    """Candidate numbers (classes, images) as int64."""
    images, lanes = coded.params["images"], coded.params["lanes"]
    codes = _bits.unpack(coded.tensors["codes"], (coded.params["bits"],), images)[:, :, 0]
    number: Array = np.arange(images) % lanes + codes.astype(np.int64) * lanes
    return number


def first_picks(coded: Coded, k: int) -> Coded:
    """The same choices for the first k images of every class."""
    lanes = coded.params["lanes"]
    return _coded(decode_picks(coded)[:, :k] // lanes, coded.params["bits"], lanes)


def check_picks(form: p.Form, classes: int, images: int, at: str = "picks") -> None:
    """Refuse another layout than the codec's."""
    if form.codec != CODEC:
        raise InvalidPackError(
            f"{at}: unknown codec {form.codec!r:.80}", code="E_CODEC", hint=f"known: {CODEC}"
        )
    p.keys(form.params, at, {"bits", "images", "lanes"})
    bits = p.integer(form.params, "bits", at, 1, MAX_BITS)
    p.integer(form.params, "images", at, images, images)
    p.integer(form.params, "lanes", at, 1, 2 ** (32 - bits))
    p.tensors(form, at, {"codes": ("U8", (classes, _bits.row_bytes((bits,), images)))})


def check_pick_values(coded: Coded, names: tuple[str, ...], chunk: int = 2**20) -> None:
    """Refuse a candidate that is used twice, and bits that mean nothing."""
    step = max(1, chunk // coded.params["images"])
    for start in range(0, len(names), step):
        rows = np.arange(start, min(start + step, len(names)))
        picks = np.sort(decode_picks(coded.take(rows)), axis=1)
        twice = (picks[:, 1:] == picks[:, :-1]).any(axis=1)
        if twice.any():
            row = start + int(np.argmax(twice))
            raise InvalidPackError(
                f"class {row} ({names[row]!r}) picks one candidate twice", code="E_PICKS"
            )
    if not _bits.spare_is_zero(
        coded.tensors["codes"], (coded.params["bits"],), coded.params["images"]
    ):
        raise InvalidPackError("bits after the last pick of a class are not zero", code="E_PICKS")


def _coded(codes: Array, bits: int, lanes: int) -> Coded:
    data = _bits.pack(codes[:, :, None], (bits,))
    return Coded(CODEC, {"codes": data}, {"bits": bits, "images": codes.shape[1], "lanes": lanes})
