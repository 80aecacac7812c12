"""What codecs share: checking parameters, checking tensors, measuring the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.coded import Array

NUMPY = {"U8": "|u1", "I8": "|i1", "U16": "<u2", "U32": "<u4", "F16": "<f2", "F32": "<f4"}
NAMES = {np.dtype(code): name for name, code in NUMPY.items()}

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype and shape


class Form(NamedTuple):
    """A section as the manifest describes it, before any of its bytes are looked at."""

    codec: str
    params: Mapping[str, Any]
    tensors: Layout
    shared: frozenset[str]


def keys(
    params: Mapping[str, Any], at: str, need: set[str], may: frozenset[str] = frozenset()
) -> None:
    """Refuse parameters that the codec does not take, and missing ones."""
    for name in sorted(set(params) - need - may):
        raise InvalidPackError(f"{at}.params.{name}: unknown parameter", code="E_CODEC")
    for name in sorted(need - set(params)):
        raise InvalidPackError(f"{at}.params.{name}: missing", code="E_CODEC")


def integer(params: Mapping[str, Any], name: str, at: str, low: int, high: int) -> int:
    """An integer parameter within its limits."""
    value = params[name]
    if type(value) is not int or not low <= value <= high:
        raise InvalidPackError(
            f"{at}.params.{name}: {value!r:.80} is not an integer from {low} to {high}",
            code="E_CODEC",
        )
    return value


def figures(params: Mapping[str, Any], name: str, at: str, parts: set[str]) -> None:
    """A parameter that records measured figures: non-negative reals."""
    value = params[name]
    if not isinstance(value, Mapping) or set(value) != parts:
        raise InvalidPackError(
            f"{at}.params.{name}: must hold {', '.join(sorted(parts))}", code="E_CODEC"
        )
    for part, figure in value.items():
        if type(figure) is not float or not 0.0 <= figure <= 1e30:
            raise InvalidPackError(
                f"{at}.params.{name}.{part}: {figure!r:.80} is not a measured figure",
                code="E_CODEC",
            )


def tensors(form: Form, at: str, layout: Layout, shared: frozenset[str] = frozenset()) -> None:
    """Refuse tensors of another name, dtype, shape or axis than the codec demands."""
    if list(form.tensors) != list(layout):
        raise InvalidPackError(
            f"{at}: tensors {list(form.tensors)!r:.200}, must be {list(layout)}", code="E_SHAPE"
        )
    for name, (dtype, shape) in layout.items():
        if form.tensors[name] != (dtype, shape):
            got, dims = form.tensors[name]
            raise InvalidPackError(
                f"{at}.{name}: {got} {list(dims)}, must be {dtype} {list(shape)}", code="E_SHAPE"
            )
    if form.shared != shared:
        raise InvalidPackError(
            f"{at}: the wrong tensors are marked as shared between classes", code="E_SHAPE"
        )


def figure(value: float) -> float:
    """A measured figure as it is recorded: four digits."""
    return float(f"{value:.4g}")


def finite_rows(array: Array, chunk: int = 2**19) -> Array:
    """For each row along the first axis: whether all values are finite."""
    rows = array.reshape(array.shape[0], -1)
    good = np.empty(len(rows), dtype=bool)
    step = max(1, chunk // rows.shape[1])  # what is made on the way fits a core's cache
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype == np.float16:  # NumPy is slow at these: infinity and NaN by their exponent
            bad = (part.view(np.uint16) & np.uint16(0x7C00)) == 0x7C00
        else:
            bad = ~np.isfinite(part)
        good[start : start + step] = ~bad.any(axis=1) if bad.any() else True
    return good
