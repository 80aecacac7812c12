"""Codecs and their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    code = "E_CODEC"

    def codec(section: str, name: str) -> Edit:
        def edit(draft: Draft) -> None:
            draft.section(section)[1] = name
            draft.reroot()

        return edit

    def params(section: str, **changes: Any) -> Edit:
        def edit(draft: Draft) -> None:
            draft.params(section).update(changes)
            draft.reroot()

        return edit

    def drop(section: str, name: str) -> Edit:
        def edit(draft: Draft) -> None:
            del draft.params(section)[name]
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
    yield "prompts-param", code, "a parameter of another codec", f16, params("prompts", dim=4)
    yield "prompts-shape", code, "no vector", f16, params("prompts", shape=[1, 0, 32])
    yield (
        "prompts-shape-large",
        code,
        "a width beyond 65536",
        f16,
        params("prompts", shape=[1, 1, 65537]),
    )
    yield "prompts-dims", code, "a shape of two sides", f16, params("prompts", shape=[1, 32])
    yield (
        "prompts-shape-text",
        code,
        "a shape of strings",
        f16,
        params("prompts", shape=["1", "1", "32"]),
    )
    yield (
        "prompts-shape-boolean",
        code,
        "a boolean for a side",
        f16,
        params("prompts", shape=[True, 1, 32]),
    )
    yield "prompts-error", code, "a measured figure", f16, params("prompts", error={"rms": 0.5})
    yield "prompts-group-missing", code, "no group", i4, drop("prompts", "group")
    yield "prompts-entries", code, "an empty codebook", pq, params("prompts", entries=0)
    yield "prompts-entries-many", code, "257 entries", pq, params("prompts", entries=257)
    yield "prompts-entries-missing", code, "no size of the codebook", pq, drop("prompts", "entries")
    yield "prompts-group", code, "a group of none", i4, params("prompts", group=0)
    yield "prompts-dim", code, "a part of no value", pq, params("prompts", dim=0)
    none, of_none = "unconditional", "outputs-unconditional"
    yield f"{none}-codec", code, "an unknown codec", of_none, codec(none, "f8")
    for name, shape in (("modes", [2, 2, 33]), ("vectors", [1, 1, 33]), ("width", [1, 2, 32])):
        breaks = f"{name} that are not those of a prompt"
        yield f"{none}-{name}", code, breaks, of_none, params(none, shape=shape)
    yield f"{none}-param", code, "a parameter of another codec", of_none, params(none, group=32)
    yield "codes-codec", code, "an unknown codec", "codes", codec("codes", "dct")
    changes: dict[str, Any] = {
        "bits": 17,
        "images": 7,
        "codes": 7,
        "codes-none": 0,
        "eta": -1.0,
        "eta-integer": 1,
        "guidance": 2000.0,
        "prompts": 1,
        "sigmas": [8.0, 4.0, 2.0, 1.0, 1.0, 0.0],
        "sigmas-few": [0.0],
        "atoms": [1, 1, 1, 1],
        "atoms-none": [0] * 5,
        "atoms-many": [1, 1, 1, 1, 257],
        "atoms-boolean": [True, 1, 1, 1, 1],
        "extra": 1,
    }
    for name, value in changes.items():
        edit = params("codes", **{name.partition("-")[0]: value})
        yield f"codes-{name}", code, f"{name} {value!r:.40}", "codes", edit
    for name, breaks, source, value in (
        ("eta-unused", "atoms of levels that take no noise", "codes", {"eta": 0.0}),
        ("eta-minus", "an eta of minus zero", "codes-start", {"eta": -0.0}),
        ("guidance-unused", "guidance without prompts", "codes-mixed", {"guidance": 2.0}),
        ("guidance-minus", "guidance of minus zero", "codes", {"guidance": -0.0}),
    ):
        yield f"codes-{name}", code, breaks, source, params("codes", **value)
    needed, unused = drop("codes", "prompts"), params("codes", prompts=False)
    yield "codes-prompts-needed", "E_SECTION", "codes under no prompts", "codes-bare", needed
    yield "codes-prompts-unused", "E_SECTION", "prompts of no image", "codes", unused
    for name in ("codes", "sigmas"):
        yield f"codes-missing-{name}", code, f"no {name}", "codes", drop("codes", name)
    usual = {"atoms": [1] * 5, "bits": 8, "eta": 1.0, "guidance": 1.0, "images": 6}
    for name, value in {**usual, "prompts": True}.items():
        edit = params("codes", **{name: value})
        yield f"codes-default-{name}", "E_CANON", f"{name} has its default", "codes", edit

    def defaults_of_none(draft: Draft) -> None:
        del draft.params("codes")["sigmas"], draft.params("codes")["codes"]
        draft.params("codes")["images"] = None
        draft.reroot()

    yield "codes-default-null", "E_CANON", "a default of nothing", "codes", defaults_of_none
    for name, sigmas in (("empty", []), ("object", {})):
        edit = params("codes", sigmas=sigmas, atoms=[])
        yield f"codes-default-{name}", "E_CANON", "a default of no steps", "codes", edit

    def default_of_another(draft: Draft) -> None:
        draft.params("codes")["bits"] = 8
        codec("codes", "dct")(draft)

    yield "codes-default-codec", "E_CANON", "a default, and a codec", "codes", default_of_another

    def picked(draft: Draft) -> None:
        draft.params("codes")["images"] = 6
        draft.reroot()

    yield "codes-all-picked", code, "picks of images that have codes", "codes-mixed", picked
    yield "classes-codec", code, "names in another encoding", f16, codec("classes", "utf16")
    yield "classes-param", code, "a parameter of the class names", f16, params("classes", x=1)
    yield "classes-bytes", code, "no name at all", f16, params("classes", bytes=0)
    yield "classes-bytes-missing", code, "no length", f16, drop("classes", "bytes")
    yield "leaves-param", code, "a parameter of the leaves", f16, params("leaves", bytes=64)
    yield "leaves-codec", code, "leaves of another hash", f16, codec("leaves", "blake2b-128")
    yield "picks-codec", code, "an unknown codec", "picks", codec("picks", "u32")
    yield "picks-bits", code, "17 bits", "picks", params("picks", bits=17)
    yield "picks-images", code, "what the pack says", "picks", params("picks", images=6)
    yield "picks-lanes", code, "no lane", "picks", params("picks", lanes=0)
    yield "picks-lanes-many", code, "more than 2**32", "picks", params("picks", lanes=2**24 + 1)
    yield "picks-param-missing", code, "no lanes", "picks", drop("picks", "lanes")
    for name, breaks, value in (
        ("bits", "25 bits", {"bits": 25}),
        ("stride", "a stride of fewer than the images", {"stride": 5}),
        ("stride-many", "more than 2**32 candidates", {"stride": 2**29 + 1}),
        ("lanes", "a parameter of the other codec", {"lanes": 1}),
    ):
        yield f"picks-sets-{name}", code, breaks, "picks-sets", params("picks", **value)
    yield "picks-sets-missing", code, "no stride", "picks-sets", drop("picks", "stride")
    yield "weights-codec", code, "an unknown codec", "weights", codec("weights", "f16")
    yield "weights-param", code, "a parameter of the weights", "weights", params("weights", bits=8)
    yield "ids-codec", code, "ids of two bytes", "selected", codec("ids", "u16")
    yield "probes-codec", code, "probes as reals", "probes", codec("probes", "f16")
    yield "ids-param", code, "a parameter of the ids", "selected", params("ids", classes=2)
    probes = "probes"
    yield "probes-count", code, "no probe", probes, params(probes, shape=[0, 4, 4])
    yield "probes-count-boolean", code, "a boolean", probes, params(probes, shape=[True, 4, 4])
    yield "probes-many", code, "4097 probes", probes, params(probes, shape=[4097, 4, 4])
    yield "probes-side", code, "a side of 8193", probes, params(probes, shape=[2, 4, 8193])
    yield "probes-channels", code, "channels", probes, params(probes, shape=[2, 3, 4, 4])
    yield "probes-param", code, "a parameter of another section", probes, params(probes, bytes=2)
    yield "probes-shape-missing", code, "no shape", probes, drop(probes, "shape")
    newer = "newer-minor"
    yield "newer-row", code, "rows of no byte", newer, params("captions", row=0)
    yield "newer-shared", code, "a real number of bytes", newer, params("captions", shared=20.0)

    def nothing(draft: Draft) -> None:
        draft.section("captions")[2:] = [{"language": "en"}]
        draft.shared["captions"] = draft.rows["captions"] = []
        draft.seal()

    yield "newer-nothing", code, "a section of nothing", newer, nothing
    yield "labels-codec", code, "an unknown codec", topk, codec("labels", "top2")
    yield "labels-k", code, "k is zero", topk, params("labels", k=0)
    yield "labels-k-large", code, "k beyond the classes", topk, params("labels", k=5)
    yield "labels-bits", code, "13 bits", topk, params("labels", bits=13)
    yield "labels-octaves", code, "65 octaves", topk, params("labels", octaves=65)
    yield "labels-k-missing", code, "no k", topk, drop("labels", "k")
    yield "labels-kept", code, "a measured figure", topk, params("labels", kept={"mean": 0.5})
    yield "labels-classes", code, "what the pack says", dense, params("labels", classes=4)
    yield "labels-images", code, "what the pack says", dense, params("labels", images=6)
    yield "adapter-codec", code, "an unknown codec", "adapter-f16", codec("adapter", "f32")
    yield "adapter-table-missing", code, "no table", "adapter-f16", drop("adapter", "table")
    yield "adapter-error", code, "a figure", "adapter-f16", params("adapter", error={"rms": 0.5})
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
    for name, breaks, shape in (
        ("dims", "seven dimensions", [1] * 7),
        ("side-large", "2**31 on a side", [2**31]),
        ("side-minus", "a negative side", [-6]),
    ):
        table = [["a", shape]]
        yield f"adapter-{name}", bad, breaks, "adapter-f16", params("adapter", table=table)
    limit, most = "E_LIMIT", 2**31 - 1
    for name, breaks, shape in (
        ("overflow", "a size beyond 64 bits", [most] * 6),
        ("data", "more than 2**40 bytes", [most, 2**10]),
    ):
        table = [["a", shape]]
        yield f"adapter-{name}", limit, breaks, "adapter-f16", params("adapter", table=table)
    yield "classes-data", limit, "2**40 bytes of names", f16, params("classes", bytes=2**40)
    yield "newer-data", limit, "2**40 bytes a row", newer, params("captions", row=2**40)
    yield from _sizes(params)


def _sizes(params: Callable[..., Edit]) -> Iterator[Case]:
    """Parameters of more or fewer bytes than the file has."""
    canon = "E_CANON"
    table = [["a", [5]], ["b", [3, 3]]]
    for name, breaks, source, edit in (
        ("adapter-size", "a table of fewer values", "adapter-f16", params("adapter", table=table)),
        ("prompts-width", "more values", "prompts-i8", params("prompts", shape=[1, 1, 33])),
        ("prompts-modes", "more modes", "prompts-modes", params("prompts", shape=[4, 2, 16])),
        ("prompts-entries-few", "a smaller codebook", "prompts-pq", params("prompts", entries=15)),
        ("prompts-group-other", "more scales", "prompts-i4", params("prompts", group=16)),
        ("picks-bits-other", "rows of another length", "picks", params("picks", bits=9)),
        ("labels-bits-other", "another length", "labels-topk", params("labels", bits=9)),
        ("probes-count-other", "one probe of two", "probes", params("probes", shape=[1, 4, 4])),
        ("classes-bytes-other", "a byte less", "prompts-i8", params("classes", bytes=30)),
        ("newer-row-other", "a byte more", "newer-minor", params("captions", row=4)),
    ):
        yield f"size-{name}", canon, breaks, source, edit
