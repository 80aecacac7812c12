"""The container: sections of tensors <-> a canonical safetensors file. It knows no meaning.

    8 bytes   length N of the header, little-endian
    N bytes   header {"__metadata__":{"d3m":"<manifest>"},"<section>.<tensor>":{...},...}, spaces
    data      tensors in the manifest's order, each at a multiple of 64, the gaps zero (`pad.*`)

The header is a pure function of the manifest, so a reader rebuilds it and compares bytes.
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
from d3pack.format.codecs.params import NAMES, NUMPY
from d3pack.format.coded import Array, Coded

ALIGN = 64
LEAF = 16  # bytes of the SHA-256 of a class's rows that are kept
MAX_HEADER = 25_000_000  # what the Hub's own header parsers take
MAX_DATA = 2**40
MAX_SECTIONS = 64
MAX_TENSORS = 16
MAX_DIMS = 6
MAX_SIDE = 2**31 - 1

KNOWN = ("classes", "leaves", "ids", "prompts", "picks", "labels", "adapter", "probes")
REQUIRED = ("classes", "leaves", "prompts")

_SECTION = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TENSOR = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in the data, and what it must hash to."""

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


def entries(sections: Mapping[str, Coded]) -> list[dict[str, Any]]:
    """The manifest's `sections`: every tensor described and hashed."""
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


def leaves(sections: Iterable[Coded], classes: int, chunk: int = 1024) -> Array:
    """For each class: the first 16 bytes of the SHA-256 of its rows, in file order."""
    rows = [
        array.reshape(classes, -1).view(np.uint8).reshape(classes, -1)
        for coded in sections
        for tensor, array in coded.tensors.items()
        if tensor not in coded.shared
    ]
    sha256, out = hashlib.sha256, []
    for start in range(0, classes, chunk):
        parts = [row[start : start + chunk] for row in rows]
        # Side by side, a class is one run of bytes; a chunk at a time bounds the copy.
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        view, size = whole.data.cast("B"), whole.shape[1]
        out += [sha256(view[at : at + size]).digest()[:LEAF] for at in range(0, len(view), size)]
    return np.frombuffer(b"".join(out), dtype=np.uint8).reshape(classes, LEAF)


def slots(sections: Any, classes: int) -> tuple[Slot, ...]:
    """Read the manifest's `sections` and place every tensor; refuse what is out of bounds."""
    out: list[Slot] = []
    at = 0
    for section in sections:
        seen: set[str] = set()
        for entry in section["tensors"]:
            where = f"sections[{section['name']}].tensors"
            if not (isinstance(entry, list) and len(entry) == 5):
                raise InvalidPackError(
                    f"{where}: not [name, dtype, shape, axis, sha256]", code="E_SECTION"
                )
            tensor, dtype, shape, axis, sha256 = entry
            if not (isinstance(tensor, str) and _TENSOR.fullmatch(tensor)) or tensor in seen:
                raise InvalidPackError(
                    f"{where}: {tensor!r:.80} is no tensor name, or there twice", code="E_SECTION"
                )
            seen.add(tensor)
            where = f"{where}[{tensor}]"
            if not isinstance(dtype, str) or dtype not in NUMPY:
                raise InvalidPackError(f"{where}: unknown dtype {dtype!r:.80}", code="E_SHAPE")
            if not isinstance(shape, list) or not all(type(side) is int for side in shape):
                raise InvalidPackError(
                    f"{where}: the shape is not an array of integers", code="E_SHAPE"
                )
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
                raise InvalidPackError(
                    f"{where}: the sha256 is not 64 hex digits", code="E_SECTION"
                )
            start = -(-at // ALIGN) * ALIGN
            at = start + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
            if at > MAX_DATA:
                raise InvalidPackError(
                    f"{where}: more than {MAX_DATA} bytes of tensors", code="E_LIMIT"
                )
            out.append(
                Slot(
                    section["name"],
                    tensor,
                    dtype,
                    tuple(shape),
                    axis == "shared",
                    sha256,
                    start,
                    at,
                )
            )
    return tuple(out)


def order(sections: Any, optional: Mapping[str, Any]) -> None:
    """Refuse sections that are malformed, missing, unknown, repeated or out of order."""
    if not isinstance(sections, list) or len(sections) > MAX_SECTIONS:
        raise InvalidPackError(
            f"sections: not an array of at most {MAX_SECTIONS}", code="E_SECTION"
        )
    names: list[str] = []
    for i, section in enumerate(sections):
        at = f"sections[{i}]"
        if not isinstance(section, dict) or set(section) != {"name", "codec", "params", "tensors"}:
            raise InvalidPackError(
                f"{at}: must hold name, codec, params and tensors, nothing else", code="E_SECTION"
            )
        name = section["name"]
        if not isinstance(name, str) or not _SECTION.fullmatch(name):
            raise InvalidPackError(f"{at}.name: {name!r:.80} is no section name", code="E_SECTION")
        if name not in KNOWN and (name not in optional or name == "pad"):
            raise InvalidPackError(
                f"{at}: unknown section {name!r} that no optional feature declares",
                code="E_SECTION",
            )
        if not isinstance(section["codec"], str) or not isinstance(section["params"], dict):
            raise InvalidPackError(
                f"{at}: codec must be a string, params an object", code="E_SECTION"
            )
        tensors = section["tensors"]
        if not isinstance(tensors, list) or not 1 <= len(tensors) <= MAX_TENSORS:
            raise InvalidPackError(
                f"{at}.tensors: not an array of 1 to {MAX_TENSORS}", code="E_SECTION"
            )
        names.append(name)
    known = [name for name in KNOWN if name in names]
    if names != known + sorted(set(names) - set(KNOWN)):
        raise InvalidPackError(
            f"sections {names!r:.200}: repeated or out of order", code="E_SECTION"
        )
    for name in REQUIRED:
        if name not in names:
            raise InvalidPackError(f"section {name!r} is missing", code="E_SECTION")


def header(manifest: str, placed: tuple[Slot, ...]) -> bytes:
    """The first bytes of the file, up to the first tensor."""
    parts = [f'{{"__metadata__":{{"d3m":{json.dumps(manifest)}}}']
    for name, dtype, shape, start, stop in _tensors(placed):
        parts.append(
            f'"{name}":{{"dtype":"{dtype}","shape":{dumps(shape)},"data_offsets":[{start},{stop}]}}'
        )
    text = (",".join(parts) + "}").encode("ascii")
    size = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def gaps(placed: tuple[Slot, ...]) -> Iterator[tuple[int, int]]:
    """The padding between tensors."""
    for before, after in pairwise(placed):
        if before.stop < after.start:
            yield before.stop, after.start


def body(placed: tuple[Slot, ...], sections: Mapping[str, Coded]) -> Iterator[bytes | memoryview]:
    """The data, piece by piece."""
    at = 0
    for slot in placed:
        yield bytes(slot.start - at)
        yield sections[slot.section].tensors[slot.tensor].data.cast("B")
        at = slot.stop


def _tensors(placed: tuple[Slot, ...]) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    at = count = 0
    for slot in placed:
        if at < slot.start:
            yield f"pad.{count}", "U8", (slot.start - at,), at, slot.start
            count += 1
        yield slot.name, slot.dtype, slot.shape, slot.start, slot.stop
        at = slot.stop


def _dtype_name(array: Array) -> str:
    name = NAMES.get(array.dtype)
    if name is None:
        raise UsageError(
            f"a tensor of dtype {array.dtype} has no place in a pack",
            hint=f"use {', '.join(NUMPY)}",
        )
    return name
