"""Picks: the candidate that each image is, in as many bits as tell the candidates apart.

`lanes`: the candidates of a class are dealt out to L lanes in turn. Image j takes one from lane j
mod L, and its code counts along that lane: candidate j mod L + code * L. With one lane, each image
may be any candidate. With as many lanes as images, each image has a few candidates of its own, for
which two or three bits are enough.

`sets`: the candidates of a class are cut into sets of one stride, and a class has a code: that of
the set whose candidates, in their order, are its images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _bits, _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.coded import Array, Coded

LANES, SETS = "lanes", "sets"
MAX_BITS, MAX_SET_BITS = 16, 24


def encode_picks(index: Any, lanes: int = 1) -> Coded:
    """Store candidate numbers (classes, images), each of the lane of its image.

    Raises:
        UsageError: the numbers are not candidates of these lanes.
    """
    index = np.asarray(index)
    if index.ndim != 2 or index.dtype.kind not in "iu" or not index.size or index.min() < 0:
        raise UsageError("picks are natural numbers (classes, images)")
    images = index.shape[1]
    if lanes < 1:
        raise UsageError(f"invalid lanes {lanes}: expected 1 or more")
    codes, lane = np.divmod(index.astype(np.int64), lanes)
    if (lane != np.arange(images) % lanes).any():
        raise UsageError(f"a picked candidate is not of its image's lane, with {lanes} lanes")
    bits = max(1, int(codes.max()).bit_length())
    if bits > MAX_BITS:
        raise UsageError(f"more than {2**MAX_BITS} candidates a lane")
    return _coded(codes, bits, lanes)


def encode_sets(sets: Any, images: int, stride: int) -> Coded:
    """Store the number of a set of each class (classes,).

    Args:
        sets: set s has the candidates s * stride and following.
        images: of each class.
        stride: candidates of a set, at least as many.

    Raises:
        UsageError: the numbers do not fit.
    """
    sets = np.asarray(sets)
    if sets.ndim != 1 or sets.dtype.kind not in "iu" or not sets.size or sets.min() < 0:
        raise UsageError("sets are natural numbers (classes,)")
    bits = max(1, int(sets.max()).bit_length())
    if bits > MAX_SET_BITS or not 1 <= images <= stride or stride << bits > 2**32:
        raise UsageError(f"more than {2**MAX_SET_BITS} sets, or too many images")
    data = _bits.pack(sets.astype(np.int64)[:, None, None], (bits,))
    return Coded(SETS, {"codes": data}, {"bits": bits, "images": images, "stride": stride})


def decode_picks(coded: Coded) -> Array:
    """Return the candidate numbers (classes, images) as int64."""
    images = coded.params["images"]
    if coded.codec == SETS:
        sets = _bits.unpack(coded.tensors["codes"], (coded.params["bits"],), 1)[:, :, 0]
        chosen: Array = np.arange(images) + sets.astype(np.int64) * coded.params["stride"]
        return chosen
    lanes = coded.params["lanes"]
    codes = _bits.unpack(coded.tensors["codes"], (coded.params["bits"],), images)[:, :, 0]
    numbers: Array = np.arange(images) % lanes + codes.astype(np.int64) * lanes
    return numbers


def first_picks(coded: Coded, images: int) -> Coded:
    """Return the picks of the first images of every class."""
    if coded.codec == SETS:
        return Coded(SETS, coded.tensors, {**coded.params, "images": images})
    lanes = coded.params["lanes"]
    return _coded(decode_picks(coded)[:, :images] // lanes, coded.params["bits"], lanes)


def layout_picks(spec: SectionSpec, classes: int, images: int, at: str = "picks") -> Layout:
    """Return the tensor of picks; codec and parameters are checked."""
    if not images:
        raise InvalidPackError(f"{at}: all images are made of codes", code="E_CODEC")
    if spec.codec == SETS:
        _checks.check_keys(spec.params, at, {"bits", "stride"})
        bits = _checks.check_integer(spec.params, "bits", at, 1, MAX_SET_BITS)
        _checks.check_integer(spec.params, "stride", at, images, 2 ** (32 - bits))
        return {"codes": Tensor("U8", (classes, _bits.row_bytes((bits,), 1)))}
    if spec.codec != LANES:
        raise InvalidPackError(
            f"{at}: unknown codec {spec.codec!r:.80}",
            code="E_CODEC",
            hint=f"known: {LANES}, {SETS}",
        )
    _checks.check_keys(spec.params, at, {"bits", "lanes"})
    bits = _checks.check_integer(spec.params, "bits", at, 1, MAX_BITS)
    _checks.check_integer(spec.params, "lanes", at, 1, 2 ** (32 - bits))
    return {"codes": Tensor("U8", (classes, _bits.row_bytes((bits,), images)))}


def check_pick_values(coded: Coded, classes: tuple[str, ...], chunk: int = 2**20) -> None:
    """Refuse a candidate that is picked twice, and bits without a meaning."""
    widths = (coded.params["bits"],)
    records = 1 if coded.codec == SETS else coded.params["images"]
    if coded.codec == LANES:
        _check_different(coded, classes, chunk)
    if not _bits.spare_is_zero(coded.tensors["codes"], widths, records):
        raise InvalidPackError("bits after the last pick of a class are not zero", code="E_PICKS")


def _check_different(coded: Coded, classes: tuple[str, ...], chunk: int) -> None:
    step = max(1, chunk // coded.params["images"])
    for start in range(0, len(classes), step):
        rows = np.arange(start, min(start + step, len(classes)))
        picks = np.sort(decode_picks(coded.take(rows)), axis=1)
        repeated = (picks[:, 1:] == picks[:, :-1]).any(axis=1)
        if repeated.any():
            row = start + int(np.argmax(repeated))
            raise InvalidPackError(
                f"class {row} ({classes[row]!r}) picks one candidate twice", code="E_PICKS"
            )


def _coded(codes: Array, bits: int, lanes: int) -> Coded:
    data = _bits.pack(codes[:, :, None], (bits,))
    return Coded(LANES, {"codes": data}, {"bits": bits, "images": codes.shape[1], "lanes": lanes})
