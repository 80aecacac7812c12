"""The container: sections in a canonical safetensors file, whatever their values mean.

    8 bytes   length N of the header, little-endian
    N bytes   header {"__metadata__":{"d3m":"<manifest>"},"shared":{...},"rows":{...}}, spaces
    data      `shared`: tensors of all classes; `rows`: for each class, its row of every tensor

Both are in the order of the manifest and without gaps. The header is a function of the manifest,
so a reader builds it again and compares the bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format.canonical import drop_defaults, spelled_defaults
from d3pack.format.codecs._checks import Layout, SectionSpec, Tensor
from d3pack.format.coded import DTYPES, Array, Coded
from d3pack.format.rules import MAX_DATA, SECTIONS, layout_opaque

ALIGN = 8  # the header and its length end at a multiple
LEAF = 16  # bytes kept of the SHA-256 of a class's row
DIGEST = 32  # hex digits kept of the SHA-256 of a section's shared bytes
MAX_HEADER = 25_000_000  # what the Hub's own header parsers accept
MAX_MARKS = 1_000_000  # commas, [ and { of a header: each may take 40 times its byte in memory
MAX_SECTIONS = 64

KNOWN = tuple(SECTIONS)
REQUIRED = ("classes", "leaves")

_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
_SECTION = re.compile(r"[a-z][a-z0-9-]{0,31}")
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST}}}")


@dataclass(frozen=True, slots=True)
class Part:
    """A section, and where it lies: in the shared bytes, and in the row of each class."""

    name: str
    codec: str
    params: Mapping[str, Any]
    layout: Layout
    shared: slice
    row: slice
    digest: str = ""  # of the shared bytes

    def check_hash(self, shared: bytes | memoryview) -> None:
        """Refuse shared bytes of this section that do not have its hash."""
        digest = hashlib.sha256(shared).hexdigest()[:DIGEST]
        if digest != self.digest:
            raise InvalidPackError(
                f"section {self.name!r} at byte {self.shared.start} of `shared`: sha256 is"
                f" {digest}, must be {self.digest}",
                code="E_HASH",
                hint="the file is damaged: fetch it again",
            )

    def decode(self, shared: bytes | memoryview, rows: Array) -> Coded:
        """Return the section from its shared bytes, and its rows of some classes."""
        tensors: dict[str, Array] = {}
        shared_at = row_at = 0
        for name, tensor in self.layout.items():
            if tensor.is_shared:
                data, shape = bytes(shared[shared_at : shared_at + tensor.nbytes]), tensor.shape
                shared_at += tensor.nbytes
            else:
                data = rows[:, row_at : row_at + tensor.nbytes].tobytes()
                shape = (len(rows), *tensor.shape[1:])
                row_at += tensor.nbytes
            tensors[name] = np.ndarray(shape, DTYPES[tensor.dtype], data)
        names = frozenset(name for name, tensor in self.layout.items() if tensor.is_shared)
        return Coded(self.codec, tensors, self.params, names)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every section of a manifest lies."""

    parts: tuple[Part, ...]
    classes: int
    shared: int  # bytes
    row: int  # bytes of one class

    @property
    def size(self) -> int:
        """Bytes after the header."""
        return self.shared + self.classes * self.row


def describe_sections(sections: Mapping[str, Coded], classes: int, images: int) -> list[list[Any]]:
    """Return the manifest's `sections`.

    Raises:
        InvalidPackError: a section does not have the tensors that its codec and parameters demand.
    """
    entries: list[list[Any]] = []
    counts = _Counts(classes, images)
    for name, coded in sections.items():
        tensors = {
            tensor: Tensor(_dtype_name(array), array.shape, tensor in coded.shared)
            for tensor, array in coded.tensors.items()
        }
        params = _stored_params(name, coded, counts.of(name))
        part = _place(name, coded.codec, params, counts.of(name))
        counts.update(part)
        _check_tensors(part, tensors)
        entry = [name, coded.codec, params]
        if shared := b"".join(_shared_parts(coded)):
            entry.append(hashlib.sha256(shared).hexdigest()[:DIGEST])
        entries.append(entry)
    return entries


class _Counts:
    """Classes, and images of each, as a section counts them: picks are of images without codes."""

    def __init__(self, classes: int, images: int) -> None:
        self._all = {"classes": classes, "images": images}
        self._seeded = self._all

    def of(self, name: str) -> Mapping[str, int]:
        """Return the counts that hold for a section."""
        return self._seeded if name == "picks" else self._all

    def update(self, part: Part) -> None:
        """Take account of a section that is placed."""
        if part.name == "codes":
            self._seeded = {**self._all, "images": self._all["images"] - part.params["images"]}


def _stored_params(name: str, coded: Coded, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the parameters as the manifest holds them.

    It leaves out what the pack implies, and defaults; it has the sizes of a newer section.
    """
    params = dict(coded.params)
    if name not in SECTIONS:
        if not set(coded.tensors) <= {"rows", "shared"}:
            raise UsageError(
                f"section {name!r} has tensors {', '.join(coded.tensors)!r:.80}",
                hint="a section of an optional feature has `rows`, uint8 (classes, bytes), and"
                " `shared`, uint8 (bytes)",
            )
        for tensor, array in coded.tensors.items():
            params["row" if tensor == "rows" else tensor] = array.shape[-1]
        return params
    for key in SECTIONS[name].implied:
        if params.pop(key, counts[key]) != counts[key]:
            raise InvalidPackError(
                f"{name}: of {coded.params[key]} {key}, the pack has {counts[key]}", code="E_CODEC"
            )
    defaults = SECTIONS[name].defaults(params)
    for key in sorted(set(defaults) - set(params)):  # only files leave them out
        raise InvalidPackError(f"{name}.params.{key}: missing", code="E_CODEC")
    return drop_defaults(params, defaults)


def _check_tensors(part: Part, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another name, dtype, shape or axis than the codec demands."""
    have, want = list(tensors.items()), list(part.layout.items())
    if have != want:
        raise InvalidPackError(
            f"{part.name}: tensors are {have!r:.200}, must be {want!r:.200}", code="E_CODEC"
        )


def compute_leaves(sections: Iterable[Coded], classes: int, chunk: int = 1024) -> Array:
    """Return, for each class, the first 16 bytes of the SHA-256 of its row."""
    sections = tuple(sections)
    leaves = [
        leaf
        for start in range(0, classes, chunk)  # a chunk bounds the copy
        for leaf in hash_rows(join_rows(sections, classes, start, start + chunk))
    ]
    return np.frombuffer(b"".join(leaves), dtype=np.uint8).reshape(classes, LEAF)


def hash_rows(rows: Array) -> Iterator[bytes]:
    """Yield the leaf of every row of bytes."""
    view, size, sha256 = rows.data.cast("B"), rows.shape[1], hashlib.sha256
    for at in range(0, len(view), size):
        yield sha256(view[at : at + size]).digest()[:LEAF]


def join_rows(
    sections: Iterable[Coded], classes: int, start: int = 0, stop: int | None = None
) -> Array:
    """Return the rows of classes, uint8 (classes, bytes of a row)."""
    parts = [
        array.reshape(classes, -1)[start:stop].view(np.uint8)
        for coded in sections
        for tensor, array in coded.tensors.items()
        if tensor not in coded.shared
    ]
    if not parts:
        raise InvalidPackError("no section has a tensor that classes divide", code="E_CODEC")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def data_parts(sections: Mapping[str, Coded]) -> Iterator[Any]:
    """Yield the bytes after the header, piece by piece."""
    for coded in sections.values():
        yield from _shared_parts(coded)
    leaves = sections["leaves"].tensors["hash"]
    yield join_rows(sections.values(), len(leaves)).data.cast("B")


def _shared_parts(coded: Coded) -> Iterator[Any]:
    return (array.data.cast("B") for name, array in coded.tensors.items() if name in coded.shared)


def place_sections(
    sections: Any, classes: int, images: int, optional: Mapping[str, Any]
) -> Placement:
    """Check the manifest's `sections`, and place every tensor."""
    _check_entries(sections, optional)
    parts: list[Part] = []
    counts = _Counts(classes, images)
    shared = row = 0
    for name, codec, params, *digest in sections:
        part = _place(name, codec, params, counts.of(name), shared, row, *digest)
        counts.update(part)
        if name == "unconditional" and params["shape"] != _shape_of_one(params["shape"], parts):
            raise InvalidPackError(
                f"unconditional: the shape {params['shape']} is not that of a prompt",
                code="E_CODEC",
            )
        shared, row = part.shared.stop, part.row.stop
        if bool(digest) != (part.shared.start < shared):
            raise _section_error(
                f"section {name!r}: a hash must be there if and only if it has shared bytes"
            )
        if shared + classes * row > MAX_DATA:
            raise InvalidPackError(
                f"section {name!r}: more than {MAX_DATA} bytes of data", code="E_LIMIT"
            )
        parts.append(part)
    codes = next((part.params for part in parts if part.name == "codes"), None)
    needed = codes is None or codes["images"] < images or codes["prompts"]
    if needed != any(part.name == "prompts" for part in parts):
        problem = "is missing" if needed else "is used by no image, and must be left out"
        raise _section_error(f"section 'prompts' {problem}")
    return Placement(tuple(parts), classes, shared, row)


def _shape_of_one(shape: Sequence[int], parts: Iterable[Part]) -> list[int]:
    """Return the shape of one prompt like those of the pack, or like this one without any."""
    like = next((part.params["shape"] for part in parts if part.name == "prompts"), shape)
    return [1, *like[1:]]


def _check_entries(sections: Any, optional: Mapping[str, Any]) -> None:
    """Refuse sections that are malformed, missing, unknown, repeated or out of order."""
    if not isinstance(sections, list) or len(sections) > MAX_SECTIONS:
        raise _section_error(f"sections: not an array of at most {MAX_SECTIONS}")
    names: list[str] = []
    for i, section in enumerate(sections):
        at = f"sections[{i}]"
        if not isinstance(section, list) or not 3 <= len(section) <= 4:
            raise _section_error(f"{at}: not [name, codec, params] or [name, codec, params, hash]")
        name, codec, params, *digest = section
        if not isinstance(name, str) or not _SECTION.fullmatch(name):
            raise _section_error(f"{at}: {name!r:.80} is not a valid section name")
        if name not in SECTIONS and name not in optional:
            raise _section_error(f"{at}: section {name!r} is unknown and not declared in optional")
        if not isinstance(codec, str) or not isinstance(params, dict):
            raise _section_error(f"{at}: codec must be a string, params an object")
        if digest and not (isinstance(digest[0], str) and _DIGEST.fullmatch(digest[0])):
            raise _section_error(f"{at}: the hash is not {DIGEST} hex digits")
        names.append(name)
    known = [name for name in KNOWN if name in names]
    if names != known + sorted(set(names) - set(KNOWN)):
        raise _section_error(f"sections {names!r:.200}: repeated or out of order")
    for name in REQUIRED:
        if name not in names:
            raise _section_error(f"section {name!r} is missing")


def _place(
    name: str,
    codec: str,
    params: Mapping[str, Any],
    counts: Mapping[str, int],
    shared: int = 0,
    row: int = 0,
    digest: str = "",
) -> Part:
    """Return the part that begins at these bytes of `shared` and of a row."""
    if name in SECTIONS:
        section = SECTIONS[name]
        params = _with_defaults(params, section.defaults(params), f"{name}.params")
        spec = SectionSpec(codec, params)
        layout = section.layout(spec, counts["classes"], counts["images"])
        params = {**params, **{key: counts[key] for key in section.implied}}
    else:
        layout = layout_opaque(SectionSpec(codec, params), counts["classes"], name)
        params = {key: value for key, value in params.items() if key not in ("row", "shared")}
    sizes = dict.fromkeys((True, False), 0)
    for tensor in layout.values():
        sizes[tensor.is_shared] += tensor.nbytes
    return Part(
        name,
        codec,
        params,
        layout,
        slice(shared, shared + sizes[True]),
        slice(row, row + sizes[False]),
        digest,
    )


def _with_defaults(
    params: Mapping[str, Any], defaults: Mapping[str, Any], at: str
) -> Mapping[str, Any]:
    """Return parameters with those that were left out; a default that is written is refused."""
    for name in spelled_defaults(params, defaults):
        raise InvalidPackError(f"{at}.{name} has its default and must be left out", code="E_CANON")
    return dict(sorted({**defaults, **params}.items()))


def build_header(manifest: str, placement: Placement) -> bytes:
    """Return the first bytes of the file, up to the data."""
    shared, size, shape = placement.shared, placement.size, (placement.classes, placement.row)
    text = (
        f'{{"__metadata__":{{"d3m":{json.dumps(manifest)}}},'
        f'"shared":{{"dtype":"U8","shape":[{shared}],"data_offsets":[0,{shared}]}},'
        f'"rows":{{"dtype":"U8","shape":[{shape[0]},{shape[1]}],"data_offsets":[{shared},{size}]}}}}'
    ).encode("ascii")
    length = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _section_error(message: str) -> InvalidPackError:
    return InvalidPackError(message, code="E_SECTION")


def _dtype_name(array: Array) -> str:
    name = _NAMES.get(array.dtype)
    if name is None:
        raise UsageError(
            f"invalid dtype {array.dtype} of a tensor: expected one of {', '.join(DTYPES)}"
        )
    return name
