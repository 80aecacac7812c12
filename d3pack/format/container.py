"""The container: sections of tensors in a canonical safetensors file, whatever they mean.

    8 bytes   length N of the header, little-endian
    N bytes   header {"__metadata__":{"d3m":"<manifest>"},"<section>.<tensor>":{...},...}, spaces
    data      tensors in the manifest's order, each at a multiple of 64, the gaps zero (`pad.*`)

The header is a function of the manifest, so a reader builds it again and compares the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.canonical import dumps
from d3pack.format.coded import DTYPES, Array, Coded

ALIGN = 64
LEAF = 16  # bytes kept of the SHA-256 of a class's rows
MAX_HEADER = 25_000_000  # what the Hub's own header parsers accept
MAX_DATA = 2**40
MAX_SECTIONS = 64
MAX_TENSORS = 16
MAX_DIMS = 6
MAX_SIDE = 2**31 - 1

KNOWN = ("classes", "leaves", "ids", "prompts", "codes", "picks", "labels", "adapter", "probes")
REQUIRED = ("classes", "leaves", "prompts")

_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
_SECTION = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TENSOR = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in the data, and its hash."""

    section: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    shared: bool
    sha256: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return f"{self.section}.{self.tensor}"

    @property
    def row(self) -> int:
        """Bytes of one class."""
        return (self.stop - self.start) // self.shape[0]

    def array(self, data: bytes, offset: int = 0) -> Array:
        """Return the tensor as a view of bytes that hold it from `offset` on."""
        count = math.prod(self.shape)
        return np.frombuffer(data, DTYPES[self.dtype], count, offset).reshape(self.shape)


def describe_sections(sections: Mapping[str, Coded]) -> list[dict[str, Any]]:
    """Return the manifest's `sections`: every tensor described and hashed."""
    return [
        {
            "name": name,
            "codec": coded.codec,
            "params": coded.params,
            "tensors": [
                [
                    tensor,
                    _dtype_name(array),
                    list(array.shape),
                    "shared" if tensor in coded.shared else "class",
                    hashlib.sha256(array.data).hexdigest(),
                ]
                for tensor, array in coded.tensors.items()
            ],
        }
        for name, coded in sections.items()
    ]


def compute_leaves(sections: Iterable[Coded], classes: int, chunk: int = 1024) -> Array:
    """Return, for each class, the first 16 bytes of the SHA-256 of its rows, in file order."""
    rows = [
        array.reshape(classes, -1).view(np.uint8).reshape(classes, -1)
        for coded in sections
        for tensor, array in coded.tensors.items()
        if tensor not in coded.shared
    ]
    sha256, leaves = hashlib.sha256, []
    for start in range(0, classes, chunk):
        parts = [row[start : start + chunk] for row in rows]
        # joined side by side, the bytes of a class follow each other; a chunk bounds the copy
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        view, size = joined.data.cast("B"), joined.shape[1]
        leaves += [sha256(view[at : at + size]).digest()[:LEAF] for at in range(0, len(view), size)]
    return np.frombuffer(b"".join(leaves), dtype=np.uint8).reshape(classes, LEAF)


def check_sections(sections: Any, optional: Mapping[str, Any]) -> None:
    """Refuse sections that are malformed, missing, unknown, repeated or out of order."""
    if not isinstance(sections, list) or len(sections) > MAX_SECTIONS:
        raise _section_error(f"sections: not an array of at most {MAX_SECTIONS}")
    names: list[str] = []
    for i, section in enumerate(sections):
        at = f"sections[{i}]"
        if not isinstance(section, dict) or set(section) != {"name", "codec", "params", "tensors"}:
            raise _section_error(f"{at}: must hold name, codec, params and tensors, nothing else")
        name = section["name"]
        if not isinstance(name, str) or not _SECTION.fullmatch(name):
            raise _section_error(f"{at}.name: {name!r:.80} is not a valid section name")
        if name not in KNOWN and (name not in optional or name == "pad"):
            raise _section_error(f"{at}: section {name!r} is unknown and not declared in optional")
        if not isinstance(section["codec"], str) or not isinstance(section["params"], dict):
            raise _section_error(f"{at}: codec must be a string, params an object")
        tensors = section["tensors"]
        if not isinstance(tensors, list) or not 1 <= len(tensors) <= MAX_TENSORS:
            raise _section_error(f"{at}.tensors: not an array of 1 to {MAX_TENSORS}")
        names.append(name)
    known = [name for name in KNOWN if name in names]
    if names != known + sorted(set(names) - set(KNOWN)):
        raise _section_error(f"sections {names!r:.200}: repeated or out of order")
    for name in REQUIRED:
        if name not in names:
            raise _section_error(f"section {name!r} is missing")


def place_tensors(sections: Any, classes: int) -> tuple[Slot, ...]:
    """Check the tensor entries of checked sections, and place every tensor."""
    slots: list[Slot] = []
    at = 0
    for section in sections:
        names: set[str] = set()
        for entry in section["tensors"]:
            where = f"sections[{section['name']}].tensors"
            tensor, dtype, shape, axis, sha256 = _check_entry(entry, where, names, classes)
            names.add(tensor)
            start = -(-at // ALIGN) * ALIGN
            at = start + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
            if at > MAX_DATA:
                raise InvalidPackError(
                    f"{where}[{tensor}]: more than {MAX_DATA} bytes of tensors", code="E_LIMIT"
                )
            shared = axis == "shared"
            slot = Slot(section["name"], tensor, dtype, tuple(shape), shared, sha256, start, at)
            slots.append(slot)
    return tuple(slots)


def _check_entry(entry: Any, where: str, names: set[str], classes: int) -> list[Any]:
    """Return [name, dtype, shape, axis, sha256]; `names` are those of earlier entries."""
    if not (isinstance(entry, list) and len(entry) == 5):
        raise _section_error(f"{where}: not [name, dtype, shape, axis, sha256]")
    tensor, dtype, shape, axis, sha256 = entry
    if not (isinstance(tensor, str) and _TENSOR.fullmatch(tensor)) or tensor in names:
        raise _section_error(f"{where}: {tensor!r:.80} is not a valid tensor name, or repeated")
    where = f"{where}[{tensor}]"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidPackError(f"{where}: unknown dtype {dtype!r:.80}", code="E_SHAPE")
    if not isinstance(shape, list) or not all(type(side) is int for side in shape):
        raise InvalidPackError(f"{where}: the shape is not an array of integers", code="E_SHAPE")
    if not 1 <= len(shape) <= MAX_DIMS or not all(1 <= side <= MAX_SIDE for side in shape):
        raise InvalidPackError(
            f"{where}: shape {shape!r:.120}, at most {MAX_DIMS} dimensions, "
            f"each from 1 to {MAX_SIDE}",
            code="E_LIMIT",
        )
    if axis not in ("class", "shared") or (axis == "class" and shape[0] != classes):
        raise InvalidPackError(
            f"{where}: axis {axis!r:.80} with first dimension {shape[0]}", code="E_SHAPE"
        )
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _section_error(f"{where}: the sha256 is not 64 hex digits")
    return entry


def build_header(manifest: str, slots: tuple[Slot, ...]) -> bytes:
    """Return the first bytes of the file, up to the first tensor."""
    parts = [f'{{"__metadata__":{{"d3m":{json.dumps(manifest)}}}']
    for name, dtype, shape, start, stop in _header_entries(slots):
        parts.append(
            f'"{name}":{{"dtype":"{dtype}","shape":{dumps(shape)},"data_offsets":[{start},{stop}]}}'
        )
    text = (",".join(parts) + "}").encode("ascii")
    size = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def gaps(slots: tuple[Slot, ...]) -> Iterator[tuple[int, int]]:
    """Yield the padding between tensors, as (first byte, byte after the last)."""
    for before, after in pairwise(slots):
        if before.stop < after.start:
            yield before.stop, after.start


def data_parts(slots: tuple[Slot, ...], sections: Mapping[str, Coded]) -> Iterator[Any]:
    """Yield the bytes after the header, piece by piece."""
    at = 0
    for slot in slots:
        yield bytes(slot.start - at)
        yield sections[slot.section].tensors[slot.tensor].data.cast("B")
        at = slot.stop


def _header_entries(
    slots: tuple[Slot, ...],
) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yield (name, dtype, shape, start, stop) of tensors and padding."""
    at = count = 0
    for slot in slots:
        if at < slot.start:
            yield f"pad.{count}", "U8", (slot.start - at,), at, slot.start
            count += 1
        yield slot.name, slot.dtype, slot.shape, slot.start, slot.stop
        at = slot.stop


def _section_error(message: str) -> InvalidPackError:
    return InvalidPackError(message, code="E_SECTION")


def _dtype_name(array: Array) -> str:
    name = _NAMES.get(array.dtype)
    if name is None:
        raise UsageError(
            f"invalid dtype {array.dtype} of a tensor: expected one of {', '.join(DTYPES)}"
        )
    return name
