"""A backbone's files inside a pack: matrices of safetensors files in eight or four bits, the rest
as is.

`files` lists [path, how, size] sorted by path. The shared bytes of the section are three runs:
`parts` has the bytes of `plain` and of `codes`, and the number of `scales`. A file stored as
`bytes` is `plain`. Of a safetensors file the header is `plain`, and `how` says for each tensor, in
the order of the offsets: 16, its bytes are `plain`; 8 or 4, bits of a value in `codes`, with a
scale for each index of the first dimension, or for each 64 values; [k], it has the bytes of tensor
k and takes none. In eight and four bits

    value = float16(float32(code) * float32(scale))

so every reader restores the same bytes, whatever library wrote the files. `i8` in place of the list
is eight bits for every F16 array of several dimensions. Models that share weights write them once
for each use; a pack holds them once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.codecs._checks import quantize_rows
from d3pack.format.coded import Array, Coded

CODEC = "files"
GROUP = 64  # values of a matrix in four bits that share a scale
MAX_GROWTH = 64  # bytes of the files for each one of the section: copies of copies fill no disk
# what the header of a file that is not safetensors can raise
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def encode_files(
    files: Mapping[str, bytes], in_four: Callable[[str, str], bool] = lambda path, name: False
) -> Coded:
    """Store files by their paths.

    Matrices of safetensors files lose bits: `decode_files` returns what they became.

    Args:
        files: by their paths.
        in_four: whether the matrix of this name in the file of this path takes four bits.
    """
    plain: list[bytes] = []
    codes: list[Array] = [np.zeros(0, np.uint8)]
    scales: list[Array] = [np.zeros(0, np.float16)]
    table: list[list[Any]] = []
    for path in sorted(files):
        data = files[path]
        if not path.endswith(".safetensors"):
            table.append([path, "bytes", len(data)])
            plain.append(data)
            continue
        start = 8 + int.from_bytes(data[:8], "little")
        plain.append(data[:start])
        numbers: dict[Any, int] = {}
        how: list[Any] = []
        for tensor in _tensors(data[8:start], len(data) - start):
            part = data[start + tensor.first : start + tensor.last]
            earlier = numbers.setdefault((tensor.shape, tensor.is_matrix, part), len(how))
            if earlier < len(how) and part:
                how.append([earlier])
            elif tensor.is_matrix:
                how.append(4 if in_four(path, tensor.name) else 8)
                matrix = np.frombuffer(part, np.float16).reshape(tensor.shape)
                for run, values in zip((codes, scales), _quantize(matrix, how[-1]), strict=True):
                    run.append(values)
            else:
                how.append(16)
                plain.append(part)
        table.append([path, "i8" if all(bits in (8, 16) for bits in how) else how, len(data)])
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
    plain, codes, scales = map(_Run, split_files(coded))
    files: dict[str, bytes] = {}
    try:
        for path, how, size in coded.params["files"]:
            if how == "bytes":
                files[path] = plain.take(size).tobytes()
                continue
            length = plain.take(8).tobytes()
            header = plain.take(int.from_bytes(length, "little")).tobytes()
            tensors = list(_tensors(header, size - 8 - len(header)))
            if how == "i8":
                how = [8 if tensor.is_matrix else 16 for tensor in tensors]
            parts: list[bytes] = []
            for tensor, bits in zip(tensors, how, strict=True):
                if type(bits) is int and bits in ((4, 8, 16) if tensor.is_matrix else (16,)):
                    part = _next(tensor, bits, plain, codes, scales)
                else:
                    part = _copied(bits, parts)
                if len(part) != tensor.last - tensor.first:
                    raise ValueError("a copy has another size")
                parts.append(part)
            files[path] = b"".join((length, header, *parts))
    except _MALFORMED as error:
        raise _invalid(f"the files cannot be restored: {error!s:.120}") from None
    if any(run.left for run in (plain, codes, scales)):
        raise _invalid("the section is longer than the files")
    return files


def split_files(coded: Coded) -> tuple[Array, Array, Array]:
    """Return the runs of a section: plain bytes, codes and scales."""
    data, (plain, codes, scales) = coded.tensors["shared"].tobytes(), coded.params["parts"]
    return (
        np.frombuffer(data, np.uint8, plain),
        np.frombuffer(data, np.uint8, codes, plain),
        np.frombuffer(data, "<f2", scales, plain + codes),
    )


def coded_bytes(shape: Sequence[int], bits: int) -> int:
    """Return the bytes that a tensor of a carried backbone takes, with eight or four bits."""
    if len(shape) < 2:
        return 2 * math.prod(shape)
    codes, scales = _counts(shape, bits)
    return codes + 2 * scales


class _Run:
    """An array that is read from its beginning to its end."""

    def __init__(self, values: Array) -> None:
        self.values, self.at = values, 0

    @property
    def left(self) -> int:
        return self.values.size - self.at

    def take(self, count: int) -> Array:
        """Return the next values."""
        if not 0 <= count <= self.left:
            raise ValueError("the section is shorter than the files")
        self.at += count
        return self.values[self.at - count : self.at]


def _counts(shape: Sequence[int], bits: int) -> tuple[int, int]:
    """Return the bytes of codes, and the scales, of a matrix."""
    count = math.prod(shape)
    return (-(-count // 2), -(-count // GROUP)) if bits == 4 else (count, shape[0])


def _quantize(matrix: Array, bits: int) -> tuple[Array, Array]:
    """Return the bytes of codes, and the scales, of a float16 matrix."""
    if bits == 8:
        codes, scales = quantize_rows(matrix.astype(np.float32).reshape(len(matrix), -1))
        return codes.view(np.uint8).ravel(), scales
    # the end of the range with the larger magnitude gets the code -8, without a search: a training
    # that rounds has to find the same scale (d3pack/train/rounding.py)
    groups = _padded(matrix.ravel(), GROUP).astype(np.float32).reshape(-1, GROUP)
    high, low = groups.max(axis=1), groups.min(axis=1)
    scales = (np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16)
    divisors = np.where(scales != 0, scales, np.float16(1)).astype(np.float32)[:, None]
    nibbles = (np.clip(np.rint(groups / divisors), -8, 7) + 8).astype(np.uint8)
    nibbles = _padded(nibbles.ravel()[: matrix.size], 2)
    return nibbles[0::2] | nibbles[1::2] << 4, scales


def _next(tensor: _Tensor, bits: int, plain: _Run, codes: _Run, scales: _Run) -> bytes:
    """Return the bytes of a tensor that takes the next ones of the runs."""
    if bits == 16:
        return plain.take(tensor.last - tensor.first).tobytes()
    count, (nbytes, groups) = math.prod(tensor.shape), _counts(tensor.shape, bits)
    packed = codes.take(nbytes)
    if bits == 8:
        values, repeats = packed.view(np.int8), count // groups
    else:
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).ravel()
        if nibbles[count:].any():
            raise ValueError("a spare nibble is not 0")
        values, repeats = nibbles[:count].astype(np.int8) - np.int8(8), GROUP
    factors = scales.take(groups).astype(np.float32).repeat(repeats)[:count]
    return (values.astype(np.float32) * factors).astype("<f2").tobytes()


def _copied(of: Any, parts: Sequence[bytes]) -> bytes:
    """Return the bytes of the earlier tensor that [k] names."""
    (number,) = of
    if type(number) is not int or not 0 <= number < len(parts):
        raise ValueError(f"{of!r:.40} is not how a tensor is stored")
    return parts[number]


def _padded(values: Array, to: int) -> Array:
    """Return values with zeros up to a multiple of a number."""
    return np.pad(values, (0, -len(values) % to))


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
        is_known = is_row and (entry[1] in ("bytes", "i8") or isinstance(entry[1], (list, tuple)))
        if not is_known or not isinstance(entry[0], str):
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
    if total > MAX_GROWTH * size:
        raise _invalid(f"the files have {total} bytes, more than {MAX_GROWTH} times the section")


def _invalid(problem: str) -> InvalidPackError:
    return InvalidPackError(f"backbone: {problem}", code="E_CODEC")


class _Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    name: str
    shape: tuple[int, ...]
    is_matrix: bool  # F16, of several dimensions
    first: int  # byte
    last: int  # the byte after the last


def _tensors(header: bytes, size: int) -> Iterator[_Tensor]:
    """Yield tensors in file order."""
    entries = [(n, entry) for n, entry in json.loads(header).items() if n != "__metadata__"]
    at = 0
    for name, entry in sorted(entries, key=lambda e: tuple(e[1]["data_offsets"])):
        (first, last), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
        count = math.prod(shape)
        is_matrix = entry["dtype"] == "F16" and len(shape) > 1 and count > 0
        if first != at or last < first or (is_matrix and last - first != 2 * count):
            raise ValueError("tensors overlap or leave gaps")
        at = last
        yield _Tensor(name, shape, is_matrix, first, last)
    if at != size:
        raise ValueError("bytes after the last tensor")
