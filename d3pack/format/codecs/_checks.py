"""What the codecs share: tensors, checks of parameters, and figures of the error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.coded import DTYPES, Array


class Tensor(NamedTuple):
    """A tensor that a codec stores; the first axis is the class unless all classes share it."""

    dtype: str
    shape: tuple[int, ...]
    is_shared: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor where all classes share it, else of its row for one class."""
        sides = self.shape if self.is_shared else self.shape[1:]
        return math.prod(sides) * np.dtype(DTYPES[self.dtype]).itemsize


Layout = dict[str, Tensor]  # the tensors of a section by name, in the order of the file


class SectionSpec(NamedTuple):
    """A section as the manifest describes it, before its bytes are read."""

    codec: str
    params: Mapping[str, Any]


def check_keys(params: Mapping[str, Any], at: str, required: Set[str]) -> None:
    """Refuse parameters that the codec does not take, and missing ones."""
    for name in sorted(set(params) - required):
        raise InvalidPackError(f"{at}.params.{name}: unknown parameter", code="E_CODEC")
    for name in sorted(required - set(params)):
        raise InvalidPackError(f"{at}.params.{name}: missing", code="E_CODEC")


def check_integer(params: Mapping[str, Any], name: str, at: str, low: int, high: int) -> int:
    """Return an integer parameter that lies within its limits."""
    value = params[name]
    if type(value) is not int or not low <= value <= high:
        raise InvalidPackError(
            f"{at}.params.{name}: {value!r:.80} is not an integer from {low} to {high}",
            code="E_CODEC",
        )
    return value


def check_shape(params: Mapping[str, Any], at: str, limits: tuple[int, ...]) -> tuple[int, ...]:
    """Return the parameter `shape`: integers from 1 to these limits."""
    shape = params["shape"]
    if not (isinstance(shape, (list, tuple)) and len(shape) == len(limits)) or not all(
        type(side) is int and 1 <= side <= limit for side, limit in zip(shape, limits, strict=True)
    ):
        raise InvalidPackError(
            f"{at}.params.shape: {shape!r:.80} is not {len(limits)} integers from 1 to"
            f" {list(limits)}",
            code="E_CODEC",
        )
    return tuple(shape)


def check_codec(spec: SectionSpec, codec: str, at: str) -> None:
    """Refuse another codec than the only one of a section."""
    if spec.codec != codec:
        raise InvalidPackError(
            f"{at}: unknown codec {spec.codec!r:.80}", code="E_CODEC", hint=f"known: {codec}"
        )


def figure(value: float) -> float:
    """Round a measured figure to the four digits that are recorded."""
    return float(f"{value:.4g}")


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """Return int8 codes and float16 scales, one a row, of float32 rows (rows, values)."""
    scales = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
    divisors = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[:, None]
    return np.clip(np.rint(rows / divisors), -127, 127).astype(np.int8), scales


def finite_rows(array: Array, chunk: int = 2**19) -> Array:
    """Return, for each row along the first axis, whether all values are finite."""
    rows = array.reshape(array.shape[0], -1)
    finite = np.empty(len(rows), dtype=bool)
    step = max(1, chunk // rows.shape[1])  # intermediate results stay in a core's cache
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype == np.float16:  # NumPy is slow here: infinity and NaN by their exponent
            bad = (part.view(np.uint16) & np.uint16(0x7C00)) == 0x7C00
        else:
            bad = ~np.isfinite(part)
        finite[start : start + step] = ~bad.any(axis=1) if bad.any() else True
    return finite
