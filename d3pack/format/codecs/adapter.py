"""Adapter codecs: named tensors that tune the backbone, as one run of values and a table of names.

A section per tensor would cost a hundred header bytes each; a table costs thirty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.codecs import params as p
from d3pack.format.coded import Array, Coded

MAX_TENSORS = 16384
MAX_DIMS = 6
MAX_SIDE = 2**31 - 1
CODECS = ("f16", "i8")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


def encode_adapter(tensors: Mapping[str, Array], codec: str = "f16") -> Coded:
    """Store named float tensors."""
    if codec not in CODECS:
        raise UsageError(f"unknown adapter codec {codec!r}", hint=f"known: {', '.join(CODECS)}")
    names = sorted(tensors)
    arrays = [np.ascontiguousarray(tensors[name], dtype=np.float32) for name in names]
    if not arrays or any(array.size == 0 for array in arrays):
        raise UsageError("an adapter needs tensors, none of them empty")
    flat = np.concatenate([array.ravel() for array in arrays])
    if not np.isfinite(flat).all() or np.abs(flat).max() > 65504:
        raise UsageError("the adapter holds a value beyond float16", hint="the tuning has diverged")
    table = [[name, list(np.atleast_1d(a).shape)] for name, a in zip(names, arrays, strict=True)]
    params: dict[str, Any] = {"table": table}
    if codec == "f16":
        out = {"values": flat.astype(np.float16)}
    else:
        scales, codes = [], []
        for array in arrays:
            rows = array.reshape(_rows(array.shape), -1)
            scale = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
            wide = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[:, None]
            scales.append(scale)
            codes.append(np.clip(np.rint(rows / wide), -127, 127).astype(np.int8).ravel())
        out = {"codes": np.concatenate(codes), "scales": np.concatenate(scales)}
    got = decode_adapter(Coded(codec, out, params, frozenset(out)))
    off = np.concatenate([got[name].ravel() for name in names]).astype(np.float64) - flat
    power = float((flat.astype(np.float64) ** 2).sum())
    params["error"] = {"rms": p.figure(math.sqrt(float((off**2).sum()) / max(power, 1e-300)))}
    return Coded(codec, out, params, frozenset(out))


def decode_adapter(coded: Coded) -> dict[str, Array]:
    """The named tensors as float32."""
    out: dict[str, Array] = {}
    at = row = 0
    for name, shape in coded.params["table"]:
        size, rows = math.prod(shape), _rows(shape)
        if coded.codec == "f16":
            values = coded.tensors["values"][at : at + size].astype(np.float32)
        else:
            scales = coded.tensors["scales"][row : row + rows].astype(np.float32)
            codes = coded.tensors["codes"][at : at + size].astype(np.float32)
            values = (codes.reshape(rows, -1) * scales[:, None]).ravel()
        out[name] = values.reshape(shape)
        at, row = at + size, row + rows
    return out


def check_adapter(form: p.Form, at: str = "adapter") -> None:
    """Refuse another layout than the codec's, or a table that does not add up."""
    if form.codec not in CODECS:
        raise InvalidPackError(
            f"{at}: unknown codec {form.codec!r:.80}",
            code="E_CODEC",
            hint=f"known: {', '.join(CODECS)}",
        )
    p.keys(form.params, at, {"table", "error"})
    p.figures(form.params, "error", at, {"rms"})
    table = form.params["table"]
    if not isinstance(table, (list, tuple)) or not 1 <= len(table) <= MAX_TENSORS:
        raise InvalidPackError(
            f"{at}.params.table: must list 1 to {MAX_TENSORS} tensors", code="E_ADAPTER"
        )
    before = ""
    size = rows = 0
    for entry in table:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            raise InvalidPackError(
                f"{at}.params.table: an entry is not a pair of name and shape", code="E_ADAPTER"
            )
        name, shape = entry
        if not _NAME.fullmatch(name) or name <= before:
            raise InvalidPackError(
                f"{at}.params.table: {name!r:.80} is no name, or out of order", code="E_ADAPTER"
            )
        if not (isinstance(shape, (list, tuple)) and 1 <= len(shape) <= MAX_DIMS) or not all(
            type(side) is int and 1 <= side <= MAX_SIDE for side in shape
        ):
            raise InvalidPackError(
                f"{at}.params.table: the shape of {name!r:.80} is out of bounds", code="E_ADAPTER"
            )
        before, size, rows = name, size + math.prod(shape), rows + _rows(shape)
    layout: p.Layout = {"values": ("F16", (size,))}
    if form.codec == "i8":
        layout = {"codes": ("I8", (size,)), "scales": ("F16", (rows,))}
    p.tensors(form, at, layout, frozenset(layout))


def check_adapter_values(coded: Coded) -> None:
    """Refuse NaN, infinity and codes without a meaning."""
    for name, array in coded.tensors.items():
        good = p.finite_rows(array) if array.dtype.kind == "f" else array != -128
        if not good.all():
            raise InvalidPackError(
                f"adapter.{name}: value {int(np.argmin(good))} is not a finite number",
                code="E_ADAPTER",
            )


def _rows(shape: Any) -> int:
    """Scales of a tensor: one for each output row of a matrix, one for a vector."""
    return int(shape[0]) if len(shape) > 1 else 1
