"""Some classes of a pack that lies elsewhere: which bytes to fetch, and how they are verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import container, rules
from d3pack.format.codecs.labels import restrict_labels
from d3pack.format.coded import DTYPES, Coded
from d3pack.format.pack import EMBEDDED, MINOR, Pack, derived
from d3pack.format.reader import Header, build_pack, check_hash

# Sections that a part has. As in `Pack.select`, those of newer minors are left out; probes are,
# because one hash covers all of them.
_PARTS = (*(name for name in container.KNOWN if name != "probes"), EMBEDDED)


class ByteRange(NamedTuple):
    """A range of the file: a tensor, or one class's row of it."""

    name: str
    start: int
    stop: int


def names_range(header: Header) -> ByteRange:
    """Return where the class names are."""
    (slot,) = (slot for slot in header.slots if slot.section == "classes")
    return ByteRange(slot.name, header.data + slot.start, header.data + slot.stop)


def read_names(header: Header, data: bytes) -> tuple[str, ...]:
    """Return the class names from the bytes of `names_range`, which are verified."""
    (slot,) = (slot for slot in header.slots if slot.section == "classes")
    check_hash(header, slot, data)
    section = header.section("classes", {slot.name: slot.array(data)})
    return rules.decode_names(section, header.classes)


def outline(header: Header, names: tuple[str, ...]) -> Pack:
    """Return a pack that can be described but not decoded: its tensors are empty."""
    empty = {slot.name: np.zeros(0, DTYPES[slot.dtype]) for slot in header.slots}
    return build_pack(header, names, header.sections(empty))


def class_ranges(header: Header, rows: Sequence[int]) -> tuple[ByteRange, ...]:
    """Return the ranges that these classes need besides the header, tensor by tensor."""
    for row in rows:
        if not 0 <= row < header.classes:
            raise UsageError(f"the pack has no class {row}, only {header.classes} classes")
    return tuple(
        ByteRange(slot.name, header.data + start, header.data + stop)
        for slot in _needed_slots(header)
        for start, stop in _spans(slot, rows)
    )


def read_class_ranges(header: Header, rows: Sequence[int], blobs: Sequence[bytes]) -> Pack:
    """Return a pack of these classes, as `Pack.select(rows)` makes it, but without probes.

    Args:
        header: of the whole pack.
        rows: the classes.
        blobs: bytes of the ranges of `class_ranges`, in its order. Shared tensors are compared
            with their SHA-256, the rows of each class with its leaf.
    """
    arrays = {}
    leaves = [hashlib.sha256() for _ in rows]
    for slot in _needed_slots(header):
        spans = _spans(slot, rows)
        parts, blobs = blobs[: len(spans)], blobs[len(spans) :]
        for (start, stop), data in zip(spans, parts, strict=True):
            if len(data) != stop - start:
                raise InvalidPackError(
                    f"{slot.name}: got {len(data)} bytes, must be {stop - start}",
                    code="E_TRUNCATED",
                )
        if slot.shared:
            check_hash(header, slot, parts[0])
        else:
            for leaf, data in zip(leaves, parts, strict=True):
                leaf.update(data)
        if slot.section in _PARTS:
            shape = slot.shape if slot.shared else (len(rows), *slot.shape[1:])
            arrays[slot.name] = np.frombuffer(b"".join(parts), DTYPES[slot.dtype]).reshape(shape)
    sections = header.sections(arrays)
    names = rules.decode_names(sections["classes"], header.classes)
    for row, leaf in zip(rows, leaves, strict=True):
        if leaf.digest()[: container.LEAF] != arrays["leaves.hash"][row].tobytes():
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
    images = header.manifest["images_per_class"]
    checked = {name: section for name, section in sections.items() if name != "ids"}
    rules.check_values(checked, names, images)
    take = np.array(rows)
    ids = sections["ids"].tensors["ids"] if "ids" in sections else take.astype(np.uint32)
    if np.unique(ids).size != ids.size:
        raise InvalidPackError("two classes have the same id", code="E_IDS")
    labels = sections.get("labels")
    return Pack(
        classes=names,
        images_per_class=images,
        recipe=header.recipe,
        prompts=sections["prompts"],
        seed=int(header.manifest["seed"], 16),
        codes=sections.get("codes"),
        picks=sections.get("picks"),
        labels=restrict_labels(labels, np.arange(len(rows)), take) if labels else None,
        adapter=sections.get("adapter"),
        provenance=derived(header.manifest["provenance"], header.root, {"select": len(rows)}),
        ids=None if np.array_equal(ids, np.arange(len(rows))) else ids,
        optional={name: header.manifest["optional"][name] for name in carried},
        extensions=carried,
        minor=MINOR,
    )


def _needed_slots(header: Header) -> Iterator[container.Slot]:
    """Yield the tensors to fetch; the leaves also cover rows of sections of newer minors."""
    return (slot for slot in header.slots if slot.section in _PARTS or not slot.shared)


def _spans(slot: container.Slot, rows: Sequence[int]) -> list[tuple[int, int]]:
    if slot.shared:
        return [(slot.start, slot.stop)]
    return [(slot.start + row * slot.row, slot.start + (row + 1) * slot.row) for row in rows]
