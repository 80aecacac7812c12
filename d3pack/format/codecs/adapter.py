"""Adapter codecs: named tensors that tune the backbone, as one run of values and a table of names.

A section for each tensor would take a hundred bytes of the header; a row of the table takes thirty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import _checks
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.codecs.table import ADAPTER_CODECS, find_codec
from d3pack.format.coded import Array, Coded

MAX_TENSORS = 16384
MAX_DIMS = 6
MAX_SIDE = 2**31 - 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


class AdapterCodec(Protocol):
    """How one codec stores the values of an adapter."""

    def encode(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """Return the tensors that hold float32 arrays one after another."""
        ...

    def decode(self, coded: Coded, values: slice, rows: slice) -> Array:
        """Return these values, flat float32; `rows` are those of the tensor, see `_rows`."""
        ...

    def layout(self, values: int, rows: int) -> Layout:
        """Return the tensors that so many values and rows take."""
        ...


def encode_adapter(tensors: Mapping[str, Array], codec: str = "f16") -> Coded:
    """Store named float tensors; the relative error is measured: `figures["error"]` of the result.

    Args:
        tensors: by name, as `d3pack.backbones.apply_adapter` takes them.
        codec: one of `ADAPTER_CODECS`.

    Raises:
        UsageError: a tensor is empty, or a value is beyond float16.
    """
    if codec not in ADAPTER_CODECS:
        known = ", ".join(ADAPTER_CODECS)
        raise UsageError(f"unknown adapter codec {codec!r}", hint=f"known: {known}")
    names = sorted(tensors)
    arrays = [np.ascontiguousarray(tensors[name], dtype=np.float32) for name in names]
    if not arrays or any(array.size == 0 for array in arrays):
        raise UsageError("an adapter needs tensors, none of them empty")
    flat = np.concatenate([array.ravel() for array in arrays])
    if not np.isfinite(flat).all() or np.abs(flat).max() > 65504:
        raise UsageError("the adapter holds a value beyond float16", hint="the tuning has diverged")
    table = [[name, list(np.atleast_1d(a).shape)] for name, a in zip(names, arrays, strict=True)]
    params: dict[str, Any] = {"table": table}
    stored = _find(codec).encode(arrays)
    decoded = decode_adapter(Coded(codec, stored, params, frozenset(stored)))
    error = np.concatenate([decoded[name].ravel() for name in names]).astype(np.float64) - flat
    power = float((flat.astype(np.float64) ** 2).sum())
    rms = math.sqrt(float((error**2).sum()) / max(power, 1e-300))
    figures = {"error": {"rms": _checks.figure(rms)}}
    return Coded(codec, stored, params, frozenset(stored), figures)


def decode_adapter(coded: Coded) -> dict[str, Array]:
    """Return the named tensors as float32."""
    method = _find(coded.codec)
    tensors: dict[str, Array] = {}
    value = row = 0
    for name, shape in coded.params["table"]:
        next_value, next_row = value + math.prod(shape), row + _rows(shape)
        flat = method.decode(coded, slice(value, next_value), slice(row, next_row))
        tensors[name] = flat.reshape(shape)
        value, row = next_value, next_row
    return tensors


def layout_adapter(spec: SectionSpec, classes: int, images: int, at: str = "adapter") -> Layout:
    """Return the tensors of an adapter; codec, parameters and table are checked."""
    method = _find(spec.codec, at)
    _checks.check_keys(spec.params, at, {"table"})
    table = spec.params["table"]
    if not isinstance(table, (list, tuple)) or not 1 <= len(table) <= MAX_TENSORS:
        raise _table_error(at, f"must list 1 to {MAX_TENSORS} tensors")
    previous = ""
    values = rows = 0
    for entry in table:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            raise _table_error(at, "an entry is not a pair of name and shape")
        name, shape = entry
        if not _NAME.fullmatch(name) or name <= previous:
            raise _table_error(at, f"{name!r:.80} is not a valid name, or out of order")
        if not (isinstance(shape, (list, tuple)) and 1 <= len(shape) <= MAX_DIMS) or not all(
            type(side) is int and 1 <= side <= MAX_SIDE for side in shape
        ):
            raise _table_error(at, f"the shape of {name!r:.80} is out of bounds")
        previous, values, rows = name, values + math.prod(shape), rows + _rows(shape)
    return method.layout(values, rows)


def check_adapter_values(coded: Coded) -> None:
    """Refuse NaN, infinity and codes without a meaning."""
    for name, array in coded.tensors.items():
        valid = _checks.finite_rows(array) if array.dtype.kind == "f" else array != -128
        if not valid.all():
            raise InvalidPackError(
                f"adapter.{name}: value {int(np.argmin(valid))} is not a finite number",
                code="E_ADAPTER",
            )


def _find(codec: str, at: str = "adapter") -> AdapterCodec:
    method: AdapterCodec = find_codec(ADAPTER_CODECS, codec, at)
    return method


def _table_error(at: str, problem: str) -> InvalidPackError:
    return InvalidPackError(f"{at}.params.table: {problem}", code="E_ADAPTER")


def _rows(shape: Any) -> int:
    """Return the scales of a tensor: one for each output row of a matrix, one for a vector."""
    return int(shape[0]) if len(shape) > 1 else 1


class Float16:
    """Two bytes a value."""

    def encode(self, arrays: Sequence[Array]) -> dict[str, Array]:
        return {"values": np.concatenate([a.ravel() for a in arrays]).astype(np.float16)}

    def decode(self, coded: Coded, values: slice, rows: slice) -> Array:
        return coded.tensors["values"][values].astype(np.float32)

    def layout(self, values: int, rows: int) -> Layout:
        return {"values": Tensor("F16", (values,), is_shared=True)}


class Int8:
    """A byte a value and a scale for every row."""

    def encode(self, arrays: Sequence[Array]) -> dict[str, Array]:
        pairs = [_checks.quantize_rows(a.reshape(_rows(a.shape), -1)) for a in arrays]
        return {
            "codes": np.concatenate([codes.ravel() for codes, _ in pairs]),
            "scales": np.concatenate([scales for _, scales in pairs]),
        }

    def decode(self, coded: Coded, values: slice, rows: slice) -> Array:
        scales = coded.tensors["scales"][rows].astype(np.float32)
        codes = coded.tensors["codes"][values].astype(np.float32)
        flat: Array = (codes.reshape(len(scales), -1) * scales[:, None]).ravel()
        return flat

    def layout(self, values: int, rows: int) -> Layout:
        codes = Tensor("I8", (values,), is_shared=True)
        return {"codes": codes, "scales": Tensor("F16", (rows,), is_shared=True)}
