"""Some classes out of a pack that is elsewhere: which bytes to fetch, and the proof of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import container, rules
from d3pack.format.codecs.labels import restrict_labels
from d3pack.format.codecs.params import NUMPY
from d3pack.format.coded import Coded
from d3pack.format.pack import EMBEDDED, MINOR, Pack, derived
from d3pack.format.reader import Header, check_hash, coded_section, under

# Sections of which a part is made. Left out: those of newer minors, as in `select`, and probes,
# which are hashed as a whole.
_PARTS = (*(name for name in container.KNOWN if name != "probes"), EMBEDDED)


class Read(NamedTuple):
    """A range of the file: a whole tensor, or one class's row of it."""

    name: str
    start: int
    stop: int


def header_size(start: bytes) -> int:
    """Return how many bytes lie before the first tensor, by the first 8 bytes of a file.

    Raises:
        InvalidPackError: more than a header may have.
    """
    size = 8 + int.from_bytes(start[:8], "little")
    if size > container.MAX_HEADER:
        raise InvalidPackError(
            f"a header of {size - 8} bytes, at most {container.MAX_HEADER}",
            code="E_LIMIT",
            hint="is this a .d3m file?",
        )
    return size


def plan_names(head: Header) -> Read:
    """Return the range of the class names."""
    slot = _names_slot(head)
    return Read(slot.name, head.data + slot.start, head.data + slot.stop)


def verify_names(head: Header, data: bytes) -> tuple[str, ...]:
    """Return the class names in the bytes of `plan_names`, which are checked by their SHA-256."""
    slot = _names_slot(head)
    check_hash(slot, data, head.data)
    tensors = {slot.tensor: np.frombuffer(data, np.uint8)}
    return rules.class_names(Coded("utf8", tensors, shared=frozenset(tensors)), head.classes)


def _names_slot(head: Header) -> container.Slot:
    return next(slot for slot in head.slots if slot.section == "classes")


def outline(head: Header, names: tuple[str, ...]) -> Pack:
    """Return a pack to describe: manifest and names are those of the file, tensors are empty."""
    blank = {slot.name: np.zeros(0, NUMPY[slot.dtype]) for slot in head.slots}
    sections = head.manifest["sections"]
    return under(head, names, {part["name"]: coded_section(part, blank) for part in sections})


def plan_reads(head: Header, rows: Sequence[int]) -> tuple[Read, ...]:
    """The ranges that these classes need, tensor by tensor; the header itself is read already."""
    for row in rows:
        if not 0 <= row < head.classes:
            raise UsageError(f"the pack has no class {row}, only {head.classes} classes")
    return tuple(
        Read(slot.name, head.data + start, head.data + stop)
        for slot in _wanted(head)
        for start, stop in _spans(slot, rows)
    )


def verify_reads(head: Header, rows: Sequence[int], blobs: Sequence[bytes]) -> Pack:
    """A pack of these classes, as `select(rows)` makes it, but without probes.

    `blobs` are the bytes of `plan_reads`, in its order. Common tensors are held against their
    SHA-256, the rows of each class against its leaf.
    """
    arrays, leaves = {}, [hashlib.sha256() for _ in rows]
    for slot in _wanted(head):
        spans = _spans(slot, rows)
        parts, blobs = blobs[: len(spans)], blobs[len(spans) :]
        for (start, stop), data in zip(spans, parts, strict=True):
            if len(data) != stop - start:
                raise InvalidPackError(
                    f"{slot.name}: got {len(data)} bytes, must be {stop - start}",
                    code="E_TRUNCATED",
                )
        if slot.shared:
            check_hash(slot, parts[0], head.data)
        else:
            for leaf, data in zip(leaves, parts, strict=True):
                leaf.update(data)
        shape = slot.shape if slot.shared else (len(rows), *slot.shape[1:])
        arrays[slot.name] = np.frombuffer(b"".join(parts), NUMPY[slot.dtype]).reshape(shape)
    coded = {
        section["name"]: coded_section(section, arrays)
        for section in head.manifest["sections"]
        if section["name"] in _PARTS
    }
    names = rules.class_names(coded["classes"], head.classes)
    for row, leaf in zip(rows, leaves, strict=True):
        if leaf.digest()[: container.LEAF] != arrays["leaves.hash"][row].tobytes():
            raise InvalidPackError(
                f"class {row} ({names[row]!r}) does not match its leaf hash",
                code="E_LEAF",
                hint="fetch it again",
            )
    return _part(head, rows, tuple(names[row] for row in rows), coded)


def _part(head: Header, rows: Sequence[int], own: tuple[str, ...], coded: dict[str, Coded]) -> Pack:
    carried = {name: coded.pop(name) for name in (EMBEDDED,) if name in coded}
    images = head.manifest["images_per_class"]
    rules.check_values({name: part for name, part in coded.items() if name != "ids"}, own, images)
    take = np.array(rows)
    ids = coded["ids"].tensors["ids"] if "ids" in coded else take.astype(np.uint32)
    if np.unique(ids).size != ids.size:
        raise InvalidPackError("two classes have the same id", code="E_IDS")
    labels = coded.get("labels")
    return Pack(
        classes=own,
        images_per_class=images,
        recipe=head.recipe,
        prompts=coded["prompts"],
        seed=int(head.manifest["seed"], 16),
        picks=coded.get("picks"),
        labels=restrict_labels(labels, np.arange(len(rows)), take) if labels else None,
        adapter=coded.get("adapter"),
        provenance=derived(head.manifest["provenance"], head.root, {"select": len(rows)}),
        ids=None if np.array_equal(ids, np.arange(len(rows))) else ids,
        optional={name: head.manifest["optional"][name] for name in carried},
        extensions=carried,
        minor=MINOR,
    )


def _wanted(head: Header) -> Iterator[container.Slot]:
    """Rows of sections that only a newer minor knows count in the leaves as well."""
    return (slot for slot in head.slots if slot.section in _PARTS or not slot.shared)


def _spans(slot: container.Slot, rows: Sequence[int]) -> list[tuple[int, int]]:
    if slot.shared:
        return [(slot.start, slot.stop)]
    return [(slot.start + row * slot.row, slot.start + (row + 1) * slot.row) for row in rows]
