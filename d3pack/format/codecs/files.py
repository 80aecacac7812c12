"""A backbone's files inside a pack: matrices of safetensors files in eight bits, the rest as is.

`files` lists [path, how, size] sorted by path. The shared bytes of the section are three runs, of
which `parts` has the numbers of values: `plain`, `codes` and `scales`. Everything that is stored
unchanged is `plain`: files stored as `bytes`, and of a file stored as `i8` its header and every
tensor that is not an F16 array of several dimensions. Those arrays are `codes`, with a scale for
each index of the first dimension, and

    value = float16(float32(code) * float32(scale))

so every reader restores the same bytes, whatever library wrote the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.codecs._checks import quantize_rows
from d3pack.format.coded import Array, Coded

CODEC = "files"
# what the header of a file that is not safetensors can raise
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_DTYPES = ("|u1", "|i1", "<f2")  # of plain, codes and scales


def encode_files(files: Mapping[str, bytes]) -> Coded:
    """Store files by their paths.

    Matrices of safetensors files lose bits: `decode_files` returns what they became.
    """
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
        for shape, is_coded, first, last in _tensors(data[8:start], len(data) - start):
            part = data[start + first : start + last]
            if not is_coded:
                plain.append(part)
                continue
            rows = np.frombuffer(part, np.float16).astype(np.float32).reshape(shape[0], -1)
            row_codes, row_scales = quantize_rows(rows)
            codes.append(row_codes.ravel())
            scales.append(row_scales)
    runs = [
        np.frombuffer(b"".join(plain), np.uint8),
        np.concatenate(codes),
        np.concatenate(scales).astype("<f2"),
    ]
    shared = np.frombuffer(b"".join(run.tobytes() for run in runs), np.uint8)
    params = {"files": table, "parts": [run.size for run in runs]}
    return Coded(CODEC, {"shared": shared}, params, frozenset({"shared"}))


def decode_files(coded: Coded, nbytes: int | None = None) -> dict[str, bytes]:
    """Return the files by their paths. Their hashes are not checked here.

    Args:
        coded: the section of the carried backbone.
        nbytes: that all files must have; others are refused before anything is decoded.

    Raises:
        InvalidPackError: the section does not hold these files (E_CODEC).
    """
    _check(coded, nbytes)
    plain, codes, scales = split_files(coded)
    raw = memoryview(plain.tobytes())
    at = code = row = 0
    files: dict[str, bytes] = {}
    try:
        for path, how, size in coded.params["files"]:
            if how == "bytes":
                files[path] = bytes(raw[at : at + size])
                at += size
                continue
            start = 8 + int.from_bytes(raw[at : at + 8], "little")
            parts = [bytes(raw[at : at + start])]
            at += start
            for shape, is_coded, first, last in _tensors(parts[0][8:], size - start):
                if not is_coded:
                    parts.append(bytes(raw[at : at + last - first]))
                    at += last - first
                    continue
                count = math.prod(shape)
                values = codes[code : code + count].astype(np.float32).reshape(shape[0], -1)
                scale = scales[row : row + shape[0]].astype(np.float32)[:, None]
                parts.append((values * scale).astype(np.float16).tobytes())
                code, row = code + count, row + shape[0]
            files[path] = b"".join(parts)
            if len(files[path]) != size:
                raise ValueError(f"{path!r:.80} has {len(files[path])} bytes, must have {size}")
    except _MALFORMED as error:
        raise _invalid(f"the files cannot be restored: {error!s:.120}") from None
    if (at, code, row) != (len(raw), codes.size, scales.size):
        raise _invalid("the section is longer or shorter than the files")
    return files


def split_files(coded: Coded) -> tuple[Array, Array, Array]:
    """Return the runs of a section: plain bytes, codes and scales."""
    data, parts = coded.tensors["shared"].tobytes(), coded.params["parts"]
    plain, codes, scales = (np.dtype(dtype) for dtype in _DTYPES)
    first, second = parts[0], parts[0] + parts[1]
    return (
        np.frombuffer(data, plain, parts[0]),
        np.frombuffer(data, codes, parts[1], first),
        np.frombuffer(data, scales, parts[2], second),
    )


def _check(coded: Coded, nbytes: int | None) -> None:
    """Refuse a section that does not list files with sizes from 0."""
    if coded.codec != CODEC or set(coded.params) != {"files", "parts"}:
        raise _invalid(f"unknown codec {coded.codec!r:.80}, or parameters that it does not take")
    size = coded.tensors["shared"].size if set(coded.tensors) == {"shared"} else -1
    parts = coded.params["parts"]
    if not (isinstance(parts, (list, tuple)) and len(parts) == 3) or not all(
        type(count) is int and count >= 0 for count in parts
    ):
        raise _invalid(f"parts are {parts!r:.80}, not three counts")
    if parts[0] + parts[1] + 2 * parts[2] != size:
        raise _invalid("the parts do not add up to the section")
    table = coded.params["files"]
    for entry in table if isinstance(table, (list, tuple)) else [table]:
        is_row = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_row or not isinstance(entry[0], str) or entry[1] not in ("bytes", "i8"):
            raise _invalid(f"{entry!r:.80} is not [path, how, size]")
        # sizes below 0 would let the files have more bytes than the tensors
        if type(entry[2]) is not int or entry[2] < 0:
            raise _invalid(f"{entry[0]!r:.80} has {entry[2]!r:.40} bytes")
    paths = [entry[0] for entry in table]
    if paths != sorted(set(paths)):
        raise _invalid("the files are not sorted, or one is listed twice")
    total = sum(entry[2] for entry in table)
    if nbytes is not None and total != nbytes:
        raise _invalid(f"the files have {total} bytes, those of the recipe {nbytes}")


def _invalid(problem: str) -> InvalidPackError:
    return InvalidPackError(f"backbone: {problem}", code="E_CODEC")


def _tensors(header: bytes, size: int) -> Iterator[tuple[tuple[int, ...], bool, int, int]]:
    """Yield (shape, whether it is coded, first byte, byte after the last) in file order."""
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
