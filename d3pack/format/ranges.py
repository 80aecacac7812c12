"""Some classes of a pack that lies elsewhere: which bytes to fetch, and how they are verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import container, rules
from d3pack.format.codecs.labels import restrict_labels
from d3pack.format.codecs.weights import part_of_weights
from d3pack.format.coded import DTYPES, Coded
from d3pack.format.pack import EMBEDDED, MINOR, Pack, derived
from d3pack.format.reader import Header, build_pack

# Sections that a part has. As in `Pack.select`, those of newer minors are left out; probes are,
# because one hash covers all of them.
_PARTS = (*(name for name in container.KNOWN if name != "probes"), EMBEDDED)


class ByteRange(NamedTuple):
    """A range of the file: shared bytes of a section, or the row of a class."""

    start: int
    stop: int


def names_range(header: Header) -> ByteRange:
    """Return where the class names are."""
    return _shared_range(header, header.part("classes"))


def read_names(header: Header, data: bytes) -> tuple[str, ...]:
    """Return the class names from the bytes of `names_range`, which are verified."""
    part = header.part("classes")
    part.check_hash(data)
    return rules.decode_names(part.decode(data, np.zeros((0, 0), np.uint8)), header.classes)


def outline(header: Header, names: tuple[str, ...]) -> Pack:
    """Return a pack that can be described but not decoded: its tensors are empty."""
    sections = {}
    for part in header.placement.parts:
        empty = {name: np.zeros(0, DTYPES[form.dtype]) for name, form in part.layout.items()}
        sections[part.name] = Coded(part.codec, empty, part.params)
    return build_pack(header, names, sections)


def class_ranges(header: Header, rows: Sequence[int]) -> tuple[ByteRange, ...]:
    """Return the ranges that these classes need besides the header: shared bytes, then rows."""
    for row in rows:
        if not 0 <= row < header.classes:
            raise UsageError(f"the pack has no class {row}, only {header.classes} classes")
    size = header.placement.row
    shared = [_shared_range(header, part) for part in _shared_parts(header)]
    starts = [header.rows + row * size for row in rows]
    return (*shared, *(ByteRange(start, start + size) for start in starts))


def read_class_ranges(header: Header, rows: Sequence[int], blobs: Sequence[bytes]) -> Pack:
    """Return a pack of these classes, as `Pack.select(rows)` makes it, but without probes.

    Args:
        header: of the whole pack.
        rows: the classes.
        blobs: bytes of the ranges of `class_ranges`, in its order. Shared bytes are compared
            with the hash of their section, the row of each class with its leaf.
    """
    for (start, stop), data in zip(class_ranges(header, rows), blobs, strict=True):
        if len(data) != stop - start:
            raise InvalidPackError(
                f"the range at {start}: got {len(data)} bytes, must be {stop - start}",
                code="E_TRUNCATED",
            )
    parts = _shared_parts(header)
    shared = dict(zip((part.name for part in parts), blobs, strict=False))
    for part in parts:
        part.check_hash(shared[part.name])
    size = header.placement.row
    taken = np.frombuffer(b"".join(blobs[len(parts) :]), np.uint8).reshape(len(rows), size)
    sections = {
        part.name: part.decode(shared.get(part.name, b""), taken[:, part.row])
        for part in header.placement.parts
        if part.name in _PARTS
    }
    names = rules.decode_names(sections["classes"], header.classes)
    for row, leaf in zip(rows, container.hash_rows(taken), strict=True):
        if leaf != sections["leaves"].tensors["hash"][row].tobytes():
            raise InvalidPackError(
                f"class {row} ({names[row]!r}) does not match its leaf hash",
                code="E_LEAF",
                hint="fetch it again",
            )
    return _build_part(header, rows, tuple(names[row] for row in rows), sections)


def _build_part(
    header: Header, rows: Sequence[int], names: tuple[str, ...], sections: dict[str, Coded]
) -> Pack:
    carried = {name: sections.pop(name) for name in (EMBEDDED,) if name in sections}
    # what a whole pack must leave out, its part may have
    checked = {name: part for name, part in sections.items() if name not in ("ids", "weights")}
    rules.check_values(checked, names, header.images)
    take = np.array(rows)
    ids = sections["ids"].tensors["ids"] if "ids" in sections else take.astype(np.uint32)
    if np.unique(ids).size != ids.size:
        raise InvalidPackError("two classes have the same id", code="E_IDS")
    labels, weights = sections.get("labels"), sections.get("weights")
    return Pack(
        classes=names,
        images_per_class=header.images,
        recipe=header.recipe,
        prompts=sections.get("prompts"),
        seed=header.seed,
        unconditional=sections.get("unconditional"),
        codes=sections.get("codes"),
        picks=sections.get("picks"),
        labels=restrict_labels(labels, np.arange(len(rows)), take) if labels else None,
        weights=part_of_weights(weights) if weights else None,
        adapter=sections.get("adapter"),
        provenance=derived(header.provenance, header.root, {"select": len(rows)}),
        ids=None if np.array_equal(ids, np.arange(len(rows))) else ids,
        optional={name: header.optional[name] for name in carried},
        extensions=carried,
        minor=MINOR,
    )


def _shared_parts(header: Header) -> list[container.Part]:
    """Return the sections whose shared bytes are needed."""
    return [part for part in header.placement.parts if part.digest and part.name in _PARTS]


def _shared_range(header: Header, part: container.Part) -> ByteRange:
    return ByteRange(header.data + part.shared.start, header.data + part.shared.stop)
