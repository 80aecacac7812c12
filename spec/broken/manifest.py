"""Fields of the manifest: version, features, identity, counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import reader
from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    source = "prompts-f16"

    def put(**changes: Any) -> Edit:
        def edit(draft: Draft) -> None:
            draft.manifest |= changes
            draft.reroot()

        return edit

    def edit_root(draft: Draft) -> None:
        draft.manifest["root"] = "0" * 64

    def edit_root_case(draft: Draft) -> None:
        draft.manifest["root"] = draft.manifest["root"].upper()

    def drop(name: str) -> Edit:
        def edit(draft: Draft) -> None:
            del draft.manifest[name]
            if name != "root":
                draft.reroot()

        return edit

    def array(draft: Draft) -> None:
        draft.text = "[]"

    yield "major-2", "E_VERSION", "a newer major version", source, put(d3m=[2, 0])
    yield "major-0", "E_VERSION", "no such version", source, put(d3m=[0, 9])
    yield (
        "requires",
        "E_FEATURE",
        "a required feature nobody knows",
        source,
        put(requires=["holograms"]),
    )
    yield (
        "requires-newer",
        "E_FEATURE",
        "the same in a newer minor",
        "newer-minor",
        put(requires=["x"]),
    )
    bad = "E_MANIFEST"
    yield "manifest-array", bad, "not an object", source, array
    yield "version-text", bad, "the version is a string", source, put(d3m="1.0")
    yield "version-boolean", bad, "the version holds a boolean", source, put(d3m=[True, 0])
    yield "requires-object", bad, "requires is an object", source, put(requires={})
    yield "field-unknown", bad, "an unknown field", source, put(zzz=1)
    yield "field-missing", bad, "no number of images", source, drop("images_per_class")
    yield "field-root-missing", bad, "no root", source, drop("root")
    yield "seed-number", bad, "the seed is a number", source, put(seed=5)
    yield "seed-upper-case", bad, "the seed in capitals", source, put(seed="0123456789ABCDEF")
    yield "classes-text", bad, "classes is a string", source, put(classes="10")
    yield "classes-boolean", bad, "classes is a boolean", source, put(classes=True)
    yield "images-real", bad, "images_per_class is a real", source, put(images_per_class=6.0)
    yield "provenance-array", bad, "provenance is an array", source, put(provenance=[])
    yield "optional-array", bad, "optional is an array", source, put(optional=["captions"])
    yield "optional-name", bad, "a feature name in capitals", source, put(optional={"Captions": {}})
    limit = "E_LIMIT"
    yield "classes-none", limit, "no class", source, put(classes=0)
    yield "classes-many", limit, "2**20 + 1 classes", source, put(classes=2**20 + 1)
    yield "images-none", limit, "no image", source, put(images_per_class=0)
    yield "images-many", limit, "2**24 + 1 images a class", source, put(images_per_class=2**24 + 1)
    yield (
        "images-total",
        limit,
        "more than 2**32 images",
        "classes-300",
        put(images_per_class=2**24),
    )
    for name, value in reader.DEFAULTS.items():
        yield f"default-{name}", "E_CANON", f"{name} has its default", source, put(**{name: value})
    yield "root-wrong", "E_ROOT", "the identity of another pack", source, edit_root
    yield "root-upper-case", "E_ROOT", "the identity in capitals", source, edit_root_case
