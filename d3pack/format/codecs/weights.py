"""Weights: how much each image counts in the loss of a training, in one byte.

Code q means 2^((q - 128) / 16), so a weight lies between 1/256 and 246 and is off by 2.2 % at most.
"""

from __future__ import annotations

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.coded import Array, Coded

CODEC = "log"
ONE = 128  # the code of the weight 1
OCTAVE = 16  # codes in which a weight doubles
_VALUES = np.exp2((np.arange(256) - ONE) / OCTAVE).astype(np.float32)


def encode_weights(weights: Array) -> Coded | None:
    """Store weights (classes, images); None where all of them are 1, which takes no bytes.

    Raises:
        UsageError: a weight is not a positive number.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or not weights.size or not (np.isfinite(weights) & (weights > 0)).all():
        raise UsageError("weights are positive numbers (classes, images)")
    codes = np.rint(np.log2(weights) * OCTAVE) + ONE
    return _coded(np.clip(codes, 0, 255).astype(np.uint8))


def decode_weights(coded: Coded) -> Array:
    """Return weights as float32 (classes, images)."""
    values: Array = _VALUES[coded.tensors["codes"]]
    return values


def part_of_weights(
    coded: Coded, classes: Array | None = None, images: int | None = None
) -> Coded | None:
    """Return the weights of some classes, or of the first images of every class."""
    codes = coded.tensors["codes"]
    return _coded(codes[slice(None) if classes is None else classes, :images])


def layout_weights(spec: SectionSpec, classes: int, images: int, at: str = "weights") -> Layout:
    """Return the tensor of weights; codec and parameters are checked."""
    _checks.check_codec(spec, CODEC, at)
    _checks.check_keys(spec.params, at, set())
    return {"codes": Tensor("U8", (classes, images))}


def check_weight_values(coded: Coded) -> None:
    """Refuse weights that say nothing."""
    if (coded.tensors["codes"] == ONE).all():
        raise InvalidPackError("all weights are 1 and must be left out", code="E_WEIGHTS")


def _coded(codes: Array) -> Coded | None:
    return None if (codes == ONE).all() else Coded(CODEC, {"codes": codes})
