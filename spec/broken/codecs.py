"""Codecs and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    code = "E_CODEC"

    def codec(section: str, name: str) -> Edit:
        def edit(draft: Draft) -> None:
            draft.section(section)["codec"] = name
            draft.reroot()

        return edit

    def params(section: str, **changes: Any) -> Edit:
        def edit(draft: Draft) -> None:
            draft.section(section)["params"] |= changes
            draft.reroot()

        return edit

    def drop(section: str, name: str) -> Edit:
        def edit(draft: Draft) -> None:
            del draft.section(section)["params"][name]
            draft.reroot()

        return edit

    f16, i4, pq, topk, dense = (
        "prompts-f16",
        "prompts-i4",
        "prompts-pq",
        "labels-topk",
        "labels-dense",
    )
    yield "prompts-codec", code, "an unknown codec", f16, codec("prompts", "f8")
    yield "prompts-shape-missing", code, "no shape", f16, drop("prompts", "shape")
    yield "prompts-error-missing", code, "no error recorded", f16, drop("prompts", "error")
    yield "prompts-param", code, "a parameter of another codec", f16, params("prompts", dim=4)
    yield "prompts-shape", code, "no vector", f16, params("prompts", shape=[1, 0, 32])
    yield (
        "prompts-shape-large",
        code,
        "a width beyond 65536",
        f16,
        params("prompts", shape=[1, 1, 65537]),
    )
    yield (
        "prompts-error",
        code,
        "a negative error",
        f16,
        params("prompts", error={"rms": -0.5, "worst": 0.5}),
    )
    yield (
        "prompts-error-integer",
        code,
        "an integer error",
        f16,
        params("prompts", error={"rms": 0, "worst": 0.5}),
    )
    yield "prompts-group", code, "a group of none", i4, params("prompts", group=0)
    yield "prompts-dim", code, "a part of no value", pq, params("prompts", dim=0)
    yield "classes-codec", code, "names in another encoding", f16, codec("classes", "utf16")
    yield "classes-param", code, "a parameter of the class names", f16, params("classes", x=1)
    yield "leaves-codec", code, "leaves of another hash", f16, codec("leaves", "blake2b-128")
    yield "picks-codec", code, "an unknown codec", "picks", codec("picks", "u32")
    yield "picks-bits", code, "17 bits", "picks", params("picks", bits=17)
    yield "picks-images", code, "of fewer images", "picks", params("picks", images=5)
    yield "picks-lanes", code, "no lane", "picks", params("picks", lanes=0)
    yield "picks-lanes-many", code, "more than 2**32", "picks", params("picks", lanes=2**24 + 1)
    yield "picks-param-missing", code, "no lanes", "picks", drop("picks", "lanes")
    yield "ids-codec", code, "ids of two bytes", "selected", codec("ids", "u16")
    yield "probes-codec", code, "probes as reals", "probes", codec("probes", "f16")
    yield "labels-codec", code, "an unknown codec", topk, codec("labels", "top2")
    yield "labels-k", code, "k is zero", topk, params("labels", k=0)
    yield "labels-k-large", code, "k beyond the classes", topk, params("labels", k=5)
    yield "labels-bits", code, "13 bits", topk, params("labels", bits=13)
    yield "labels-octaves", code, "65 octaves", topk, params("labels", octaves=65)
    yield "labels-kept-missing", code, "no kept mass recorded", topk, drop("labels", "kept")
    yield (
        "labels-kept",
        code,
        "the kept mass without its least",
        topk,
        params("labels", kept={"mean": 0.5}),
    )
    yield "labels-classes", code, "labels of five classes", dense, params("labels", classes=5)
    yield "labels-images", code, "labels of seven images", dense, params("labels", images=7)
    yield (
        "labels-restricted",
        code,
        "half of the figures",
        dense,
        params("labels", restricted={"mean": 0.5}),
    )
    yield "adapter-codec", code, "an unknown codec", "adapter-f16", codec("adapter", "f32")
    yield "adapter-error", code, "no error recorded", "adapter-f16", drop("adapter", "error")
    bad, table = "E_ADAPTER", [["a", [5]], ["b", [4, 3]]]
    yield "adapter-table", bad, "not an array", "adapter-f16", params("adapter", table={})
    yield "adapter-table-empty", bad, "no tensor", "adapter-f16", params("adapter", table=[])
    yield (
        "adapter-table-order",
        bad,
        "not sorted",
        "adapter-f16",
        params("adapter", table=table[::-1]),
    )
    yield (
        "adapter-table-twice",
        bad,
        "a name twice",
        "adapter-f16",
        params("adapter", table=table[:1] * 2),
    )
    yield (
        "adapter-table-name",
        bad,
        "a name with a slash",
        "adapter-f16",
        params("adapter", table=[["a/b", [17]]]),
    )
    yield (
        "adapter-table-shape",
        bad,
        "an empty tensor",
        "adapter-f16",
        params("adapter", table=[["a", [0]]]),
    )
    yield (
        "adapter-table-scalar",
        bad,
        "no dimension",
        "adapter-f16",
        params("adapter", table=[["a", []]]),
    )
    yield "adapter-table-entry", bad, "not a pair", "adapter-f16", params("adapter", table=["a"])
    yield (
        "adapter-size",
        "E_SHAPE",
        "a table of fewer values",
        "adapter-f16",
        params("adapter", table=table[:1]),
    )
    yield (
        "prompts-i8-width",
        "E_SHAPE",
        "a width that the codes do not have",
        "prompts-i8",
        params("prompts", shape=[1, 1, 31]),
    )
    yield "labels-bits-other", "E_SHAPE", "rows of another length", topk, params("labels", bits=9)
