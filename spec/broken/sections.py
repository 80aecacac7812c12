"""Sections and the shapes of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from draft import Draft, canonical

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    source, code = "everything", "E_SECTION"

    def edit(change: Callable[[Draft, list[Any]], Any]) -> Edit:
        def run(draft: Draft) -> None:
            change(draft, draft.manifest["sections"])
            draft.reroot()

        return run

    def tensor(name: str, at: int, value: Any) -> Edit:
        def run(draft: Draft) -> None:
            draft.tensor(name)[at] = value
            draft.reroot()

        return run

    def not_array(draft: Draft) -> bytes:
        whole = draft.bytes()
        draft.manifest["sections"] = {}
        draft.reroot()
        # The header below is the old one: the sections are read before it.
        old = json.loads(whole[8 : 8 + struct.unpack_from("<Q", whole)[0]])
        old["__metadata__"]["d3m"] = canonical(draft.manifest)
        text = json.dumps(old, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text)) + text

    yield "sections-object", code, "not an array", source, not_array
    yield "section-prompts-missing", code, "no prompts", source, edit(lambda d, s: s.pop(2))
    yield "section-leaves-missing", code, "no leaves", source, edit(lambda d, s: s.pop(1))
    yield "section-classes-missing", code, "no class names", source, edit(lambda d, s: s.pop(0))
    yield (
        "section-order",
        code,
        "labels before picks",
        source,
        edit(lambda d, s: s.__setitem__(slice(3, 5), s[4:2:-1])),
    )
    yield "section-twice", code, "prompts twice", source, edit(lambda d, s: s.insert(3, s[2]))
    yield (
        "section-unknown",
        code,
        "a section that no optional feature declares",
        "newer-minor",
        edit(lambda d, s: d.manifest["optional"].pop("captions")),
    )
    yield (
        "section-field",
        code,
        "an unknown field of a section",
        source,
        edit(lambda d, s: s[2].update(note=1)),
    )
    yield (
        "section-no-params",
        code,
        "a section without params",
        source,
        edit(lambda d, s: s[2].pop("params")),
    )
    yield (
        "section-params-array",
        code,
        "params is an array",
        source,
        edit(lambda d, s: s[2].update(params=[])),
    )
    yield (
        "section-name",
        code,
        "a name with a dot",
        source,
        edit(lambda d, s: s[2].update(name="a.b")),
    )
    yield (
        "section-no-tensors",
        code,
        "a section of nothing",
        source,
        edit(lambda d, s: s[6].update(tensors=[])),
    )
    yield "section-many", code, "65 sections", source, edit(lambda d, s: s.extend(s[:1] * 60))
    yield (
        "tensor-twice",
        code,
        "a tensor twice",
        source,
        edit(lambda d, s: s[2]["tensors"].append(s[2]["tensors"][0])),
    )
    yield (
        "tensor-name",
        code,
        "a tensor name in capitals",
        source,
        tensor("picks.codes", 0, "CODES"),
    )
    yield (
        "tensor-hash-case",
        code,
        "a hash in capitals",
        source,
        tensor("picks.codes", 4, "AB" * 32),
    )
    yield (
        "tensor-entry",
        code,
        "an entry of four parts",
        source,
        edit(lambda d, s: s[3]["tensors"][0].pop()),
    )
    shape = "E_SHAPE"
    yield (
        "tensor-dtype",
        shape,
        "a dtype that the format does not have",
        source,
        tensor("picks.codes", 1, "F64"),
    )
    yield (
        "tensor-dtype-other",
        shape,
        "codes as signed bytes",
        source,
        tensor("picks.codes", 1, "I8"),
    )
    yield (
        "tensor-shape-text",
        shape,
        "a shape of strings",
        source,
        tensor("picks.codes", 2, ["4", "6"]),
    )
    yield (
        "tensor-shape-boolean",
        shape,
        "a boolean for a side",
        source,
        tensor("probes.labels", 2, [True]),
    )
    yield "tensor-axis", shape, "an unknown axis", source, tensor("picks.codes", 3, "image")
    yield (
        "tensor-axis-size",
        shape,
        "a class axis of other length",
        source,
        tensor("picks.codes", 2, [3, 8]),
    )
    yield (
        "tensor-axis-wrong",
        shape,
        "codes marked as shared",
        source,
        tensor("prompts.codes", 3, "shared"),
    )
    yield (
        "tensor-width",
        shape,
        "fewer images than the pack has",
        source,
        tensor("picks.codes", 2, [4, 5]),
    )
    yield "leaves-width", shape, "leaves of 8 bytes", source, tensor("leaves.hash", 2, [8, 8])
    yield (
        "probes-channels",
        shape,
        "images of two channels",
        source,
        tensor("probes.images", 2, [2, 2, 6, 4]),
    )
    yield (
        "prompts-dims",
        shape,
        "three dimensions for four",
        source,
        tensor("prompts.codes", 2, [4, 1, 8]),
    )
    yield (
        "tensor-renamed",
        shape,
        "another tensor than the codec's",
        source,
        edit(lambda d, s: s[3]["tensors"][0].__setitem__(0, "indices")),
    )

    def unbooked(draft: Draft) -> None:
        tensors = draft.section("prompts")["tensors"]
        tensors[:] = [entry for entry in tensors if entry[0] != "codebook"]
        del draft.blobs["prompts.codebook"]
        draft.seal()

    def renamed(draft: Draft) -> None:
        draft.section("classes")["tensors"] = [["images", "U8", [5000], "shared", ""]]
        draft.blobs["classes.images"] = draft.blobs.pop("classes.text") * 5000
        draft.seal()

    shape = "E_SHAPE"
    yield "tensor-no-codebook", shape, "codes without their codebook", "prompts-pq", unbooked
    yield "tensor-name-of-probes", shape, "class names under another name", "smallest", renamed
    limit = "E_LIMIT"
    yield (
        "tensor-dims",
        limit,
        "seven dimensions",
        source,
        tensor("picks.codes", 2, [4, 1, 1, 1, 1, 1, 6]),
    )
    yield "tensor-scalar", limit, "no dimension", source, tensor("probes.labels", 2, [])
    yield "tensor-side-zero", limit, "an empty dimension", source, tensor("picks.codes", 2, [4, 0])
    yield (
        "tensor-side-large",
        limit,
        "2**31 on a side",
        source,
        tensor("picks.codes", 2, [4, 2**31]),
    )
    yield "tensor-side-minus", limit, "a negative side", source, tensor("picks.codes", 2, [4, -6])
    yield (
        "tensor-overflow",
        limit,
        "a size beyond 64 bits",
        source,
        tensor("prompts.codebook", 2, [2**31 - 1] * 6),
    )
    yield (
        "tensor-data",
        limit,
        "more than 2**40 bytes",
        source,
        tensor("prompts.codebook", 2, [2**31 - 1, 2**10]),
    )
    yield "probes-many", limit, "4097 probes", source, tensor("probes.images", 2, [4097, 3, 1, 1])
