"""One class out of a pack that is elsewhere: which bytes to fetch, and the proof of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from d3pack import container
from d3pack.codecs.labels import restrict_labels
from d3pack.codecs.params import NUMPY
from d3pack.errors import LeafError, TruncatedError, UsageError
from d3pack.format import rules
from d3pack.format.reader import Header, check_hash, coded_section
from d3pack.pack import EMBEDDED, MINOR, Pack, derived

# What one class cannot do without although it belongs to all of them.
_COMMON = ("classes", "leaves", "prompts", "adapter", EMBEDDED)


class Read(NamedTuple):
    """A range of the file: `name` is the key under which `verify_class` wants its bytes."""

    name: str
    start: int
    stop: int


def plan_class_reads(head: Header, index: int) -> tuple[Read, ...]:
    """The ranges that one class needs, in file order; the header itself is read already."""
    if not 0 <= index < head.classes:
        raise UsageError(f"the pack has no class {index}, only {head.classes} classes")
    return tuple(
        Read(slot.name, head.data + start, head.data + stop)
        for slot, start, stop in _wanted(head, index)
    )


def verify_class(head: Header, index: int, blobs: Mapping[str, bytes]) -> Pack:
    """A pack of this class alone, as `select([index])` makes it, but without probes.

    Common tensors are held against their SHA-256, the rows of the class against its leaf.
    """
    rows, arrays = [], {}
    for slot, start, stop in _wanted(head, index):
        data = blobs[slot.name]
        if len(data) != stop - start:
            raise TruncatedError(f"{slot.name}: got {len(data)} bytes, must be {stop - start}")
        if slot.shared:
            check_hash(slot, data, head.data)
        else:
            rows.append(data)
        shape = slot.shape if slot.shared else (1, *slot.shape[1:])
        arrays[slot.name] = np.frombuffer(data, NUMPY[slot.dtype]).reshape(shape)
    leaf = hashlib.sha256(b"".join(rows)).digest()[: container.LEAF]
    if leaf != arrays["leaves.hash"][index].tobytes():
        raise LeafError(f"class {index} does not match its leaf hash", hint="fetch it again")
    coded = {
        section["name"]: coded_section(section, arrays)
        for section in head.manifest["sections"]
        if section["name"] in (*container.KNOWN, EMBEDDED) and section["name"] != "probes"
    }
    carried = {name: coded.pop(name) for name in (EMBEDDED,) if name in coded}
    names = rules.class_names(coded["classes"], head.classes)
    own = (names[index],)
    images = head.manifest["images_per_class"]
    rules.check_values({name: part for name, part in coded.items() if name != "ids"}, own, images)
    ids = coded["ids"].tensors["ids"] if "ids" in coded else np.array([index], dtype=np.uint32)
    labels = coded.get("labels")
    return Pack(
        classes=own,
        images_per_class=images,
        recipe=head.recipe,
        prompts=coded["prompts"],
        seed=int(head.manifest["seed"], 16),
        picks=coded["picks"].tensors["index"] if "picks" in coded else None,
        labels=restrict_labels(labels, np.array([0]), np.array([index])) if labels else None,
        adapter=coded.get("adapter"),
        provenance=derived(head.manifest["provenance"], head.root, {"select": 1}),
        ids=None if ids[0] == 0 else ids,
        optional={name: head.manifest["optional"][name] for name in carried},
        extensions=carried,
        minor=MINOR,
    )


def _wanted(head: Header, index: int) -> Iterator[tuple[container.Slot, int, int]]:
    for slot in head.slots:
        if not slot.shared:
            yield slot, slot.start + index * slot.row, slot.start + (index + 1) * slot.row
        elif slot.section in _COMMON:
            yield slot, slot.start, slot.stop
