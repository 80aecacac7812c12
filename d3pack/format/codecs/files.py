"""A backbone's files inside a pack: matrices of safetensors files in eight bits, the rest as is.

`files` lists [path, how, size] sorted by path. All that is stored as it stands is one run of bytes,
`plain`; of a file stored as `i8` that is its header and every tensor that is not an F16 array of
several dimensions. Those are `codes`, with a scale for each index of the first dimension, and

    value = float16(float32(code) * float32(scale))

so the files come back bit for bit, whatever library wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.coded import Array, Coded

CODEC = "files"
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
FORMS = {"plain": np.uint8, "codes": np.int8, "scales": np.float16}


def encode_files(files: Mapping[str, bytes]) -> Coded:
    """Store files; matrices of safetensors lose bits, so decode to know what they became."""
    plain: list[bytes] = []
    codes: list[Array] = [np.zeros(0, np.int8)]
    scales: list[Array] = [np.zeros(0, np.float16)]
    table: list[list[Any]] = []
    for path in sorted(files):
        data = files[path]
        how = "i8" if path.endswith(".safetensors") else "bytes"
        table.append([path, how, len(data)])
        if how == "bytes":
            plain.append(data)
            continue
        start = 8 + int.from_bytes(data[:8], "little")
        plain.append(data[:start])
        for shape, is_coded, first, last in _layout(data[8:start], len(data) - start):
            part = data[start + first : start + last]
            if not is_coded:
                plain.append(part)
                continue
            rows = np.frombuffer(part, np.float16).astype(np.float32).reshape(shape[0], -1)
            scale = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
            wide = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[:, None]
            codes.append(np.clip(np.rint(rows / wide), -127, 127).astype(np.int8).ravel())
            scales.append(scale)
    tensors = {
        "plain": np.frombuffer(b"".join(plain), np.uint8),
        "codes": np.concatenate(codes),
        "scales": np.concatenate(scales),
    }
    kept = {name: array for name, array in tensors.items() if array.size}
    return Coded(CODEC, kept, {"files": table}, frozenset(kept))


def decode_files(coded: Coded, sizes: Mapping[str, int] | None = None) -> dict[str, bytes]:
    """The files as they became; whoever opens them compares their hashes.

    With `sizes`, those of the lock, another table is refused before anything is put together.
    """
    _check(coded, sizes)
    found = [coded.tensors.get(name, np.zeros(0, form)) for name, form in FORMS.items()]
    plain, codes, scales = memoryview(found[0].tobytes()), found[1], found[2]
    at = code = row = 0
    out: dict[str, bytes] = {}
    try:
        for path, how, size in coded.params["files"]:
            if how == "bytes":
                out[path] = bytes(plain[at : at + size])
                at += size
                continue
            start = 8 + int.from_bytes(plain[at : at + 8], "little")
            parts = [bytes(plain[at : at + start])]
            at += start
            for shape, is_coded, first, last in _layout(parts[0][8:], size - start):
                if not is_coded:
                    parts.append(bytes(plain[at : at + last - first]))
                    at += last - first
                    continue
                count = math.prod(shape)
                values = codes[code : code + count].astype(np.float32).reshape(shape[0], -1)
                scale = scales[row : row + shape[0]].astype(np.float32)[:, None]
                parts.append((values * scale).astype(np.float16).tobytes())
                code, row = code + count, row + shape[0]
            out[path] = b"".join(parts)
            if len(out[path]) != size:
                raise ValueError(f"{path!r:.80} comes to {len(out[path])} bytes")
    except _MALFORMED as error:
        raise InvalidPackError(
            f"backbone: the files cannot be put together: {error!s:.120}", code="E_CODEC"
        ) from None
    if (at, code, row) != (len(plain), codes.size, scales.size):
        raise InvalidPackError(
            "backbone: values that belong to no file, or too few of them", code="E_CODEC"
        )
    return out


def _check(coded: Coded, sizes: Mapping[str, int] | None) -> None:
    """Refuse what is not files: sizes that go backwards would make more bytes than there are."""
    if coded.codec != CODEC or set(coded.params) != {"files"}:
        raise InvalidPackError(f"backbone: not files, but {coded.codec!r:.80}", code="E_CODEC")
    for name, array in coded.tensors.items():
        if FORMS.get(name) != array.dtype or array.ndim != 1 or name not in coded.shared:
            raise InvalidPackError(
                f"backbone.{name}: {array.dtype} {list(array.shape)} has no meaning", code="E_CODEC"
            )
    table = coded.params["files"]
    for entry in table if isinstance(table, (list, tuple)) else [table]:
        fine = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not fine or not isinstance(entry[0], str) or entry[1] not in ("bytes", "i8"):
            raise InvalidPackError(
                f"backbone: {entry!r:.80} is not [path, how, size]", code="E_CODEC"
            )
        if type(entry[2]) is not int or entry[2] < 0:
            raise InvalidPackError(
                f"backbone: {entry[0]!r:.80} has {entry[2]!r:.40} bytes", code="E_CODEC"
            )
    paths = [entry[0] for entry in table]
    if paths != sorted(set(paths)):
        raise InvalidPackError(
            "backbone: the files are not sorted, or one is there twice", code="E_CODEC"
        )
    if sizes is not None and {path: size for path, _, size in table} != dict(sizes):
        raise InvalidPackError(
            "backbone: the files are not those of the recipe, or of other sizes", code="E_CODEC"
        )


def _layout(header: bytes, size: int) -> Iterator[tuple[tuple[int, ...], bool, int, int]]:
    """(shape, whether it is coded, first byte, byte after the last) of tensors in file order."""
    entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
    at = 0
    for entry in sorted(entries.values(), key=lambda e: tuple(e["data_offsets"])):
        (first, last), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
        count = math.prod(shape)
        is_coded = entry["dtype"] == "F16" and len(shape) > 1 and count > 0
        if first != at or last < first or (is_coded and last - first != 2 * count):
            raise ValueError("tensors overlap or leave gaps")
        at = last
        yield shape, is_coded, first, last
    if at != size:
        raise ValueError("bytes after the last tensor")
