"""What the codecs share: checks of parameters and tensors, and figures of the error."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.coded import Array

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype and shape


class SectionSpec(NamedTuple):
    """A section as the manifest describes it, before its bytes are read."""

    codec: str
    params: Mapping[str, Any]
    tensors: Layout
    shared: frozenset[str]


def check_keys(
    params: Mapping[str, Any], at: str, required: Set[str], optional: Set[str] = frozenset()
) -> None:
    """Refuse parameters that the codec does not take, and missing ones."""
    for name in sorted(set(params) - required - optional):
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


def check_figures(params: Mapping[str, Any], name: str, at: str, parts: Set[str]) -> None:
    """Refuse a parameter unless it holds these measured figures: reals that are not negative."""
    value = params[name]
    if not isinstance(value, Mapping) or set(value) != parts:
        raise InvalidPackError(
            f"{at}.params.{name}: must hold {', '.join(sorted(parts))}", code="E_CODEC"
        )
    for part, number in value.items():
        if type(number) is not float or not 0.0 <= number <= 1e30:
            raise InvalidPackError(
                f"{at}.params.{name}.{part}: {number!r:.80} is not a real from 0 to 1e30",
                code="E_CODEC",
            )


def check_tensors(
    spec: SectionSpec, at: str, layout: Layout, shared: frozenset[str] = frozenset()
) -> None:
    """Refuse tensors of another name, dtype, shape or axis than the codec demands."""
    if list(spec.tensors) != list(layout):
        raise InvalidPackError(
            f"{at}: tensors {list(spec.tensors)!r:.200}, must be {list(layout)}", code="E_SHAPE"
        )
    for name, (dtype, shape) in layout.items():
        if spec.tensors[name] != (dtype, shape):
            actual_dtype, actual_shape = spec.tensors[name]
            raise InvalidPackError(
                f"{at}.{name}: {actual_dtype} {list(actual_shape)}, must be {dtype} {list(shape)}",
                code="E_SHAPE",
            )
    if spec.shared != shared:
        raise InvalidPackError(
            f"{at}: the wrong tensors are marked as shared between classes", code="E_SHAPE"
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
