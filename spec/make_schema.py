"""Write spec/manifest.schema.json, the JSON Schema of the manifest, out of the code's own limits.

python spec/make_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d3pack.format import coded, container, reader, recipe

FEATURE = "^[a-z][a-z0-9-]{0,31}$"


def text(pattern: str) -> dict[str, Any]:
    """A string that matches as a whole."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def integer(low: int, high: int) -> dict[str, Any]:
    """An integer from low to high."""
    return {"type": "integer", "minimum": low, "maximum": high}


def array(items: Any, low: int, high: int) -> dict[str, Any]:
    """An array of low to high items of one kind."""
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def tuples(*items: Any) -> dict[str, Any]:
    """An array of exactly these items."""
    return {"type": "array", "prefixItems": list(items), "items": False, "minItems": len(items)}


def sampled(name: str, **properties: Any) -> dict[str, Any]:
    """What a sampler demands of other fields."""
    chosen = {"properties": {"sampler": {"const": name}}}
    return {"if": chosen, "then": {"properties": properties}}


def schema() -> dict[str, Any]:
    """The schema as a value."""
    sha256 = text("[0-9a-f]{64}")
    line = text(rf"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{{0,{recipe.MAX_TEXT}}}")
    path = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,254})*"
    name = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    real = {"type": "number", "$comment": "always with a point or an exponent"}
    backbone = closed(
        kind=text("[a-z0-9][a-z0-9._-]{0,63}"),
        repo=text(f"|{name}(/{name})?"),
        revision=text("[0-9a-f]{40}"),
        files={
            "type": "object",
            "propertyNames": {**text(path), "maxLength": recipe.MAX_TEXT},
            "additionalProperties": tuples(integer(0, recipe.MAX_FILE_SIZE), sha256),
            "minProperties": 1,
            "maxProperties": recipe.MAX_FILES,
        },
        licence=line,
    )
    number = {"type": "number"}
    rows = array(tuples(number, array(number, 1, recipe.MAX_ORDER)), 1, recipe.MAX_STEPS)
    tensor = tuples(
        text("[a-z][a-z0-9_]{0,31}"),
        {"enum": list(coded.DTYPES)},
        array(integer(1, container.MAX_SIDE), 1, container.MAX_DIMS),
        {"enum": ["class", "shared"]},
        sha256,
    )
    section = closed(
        name={"type": "string", "pattern": FEATURE, "not": {"const": "pad"}},
        codec={"type": "string"},
        params={"type": "object"},
        tensors=array(tensor, 1, container.MAX_TENSORS),
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "d3m-1/manifest.schema.json",
        "title": "The manifest of a .d3m file, version 1",
        "$comment": "Made by spec/make_schema.py. What it cannot say, d3m-1.md says.",
        **closed(
            d3m=tuples({"const": 1}, integer(0, 2**31 - 1)),
            requires=array({"type": "string"}, 0, 0),
            optional={"type": "object", "propertyNames": {"pattern": FEATURE}},
            classes=integer(1, reader.MAX_CLASSES),
            images_per_class=integer(1, reader.MAX_IMAGES),
            seed=text("[0-9a-f]{16}"),
            recipe=closed(
                backbone=backbone,
                size={**array(integer(1, recipe.MAX_SIDE), 2, 2)},
                sampler={"enum": list(recipe.SAMPLERS)},
                sigmas=array({**real, "minimum": 0, "maximum": 1e6}, 2, recipe.MAX_STEPS + 1),
                guidance={**real, "minimum": -1000, "maximum": 1000},
                guided_channels=integer(0, 1024),
                template=line,
                dtype={"enum": list(recipe.DTYPES)},
                group=integer(1, recipe.MAX_GROUP),
                noise={"const": recipe.NOISE},
                extra={"type": "object"},
            )
            | {
                "allOf": [
                    sampled("lcm", sigmas={"maxItems": recipe.MAX_FRESH + 1}),
                    sampled("table", extra={"required": ["table"], "properties": {"table": rows}}),
                ]
            },
            provenance={"type": "object"},
            sections={
                **array(section, len(container.REQUIRED), container.MAX_SECTIONS),
                "allOf": [
                    {"contains": {"properties": {"name": {"const": required}}}}
                    for required in container.REQUIRED
                ],
            },
            root=sha256,
        ),
    }


def main() -> None:
    """Write the file."""
    path = Path(__file__).with_name("manifest.schema.json")
    path.write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
