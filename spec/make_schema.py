"""Write spec/manifest.schema.json, the JSON Schema of the manifest, out of the code's own limits.

python spec/make_schema.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3pack.format import container, pack, reader, recipe
from d3pack.format.codecs import codes

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


def closed(defaults: Mapping[str, Any], **properties: Any) -> dict[str, Any]:
    """An object with exactly these fields; those with a default are left out if they have it.

    A default of None depends on other fields.
    """
    fields = {
        name: {**value, "default": defaults[name], "not": {"const": defaults[name]}}
        if defaults.get(name) is not None
        else value
        for name, value in properties.items()
    }
    return {
        "type": "object",
        "properties": fields,
        "required": sorted(set(properties) - set(defaults)),
        "additionalProperties": False,
    }


def tuples(*items: Any) -> dict[str, Any]:
    """An array of exactly these items."""
    return {"type": "array", "prefixItems": list(items), "items": False, "minItems": len(items)}


def sampled(name: str, own: str = "", **properties: Any) -> dict[str, Any]:
    """What a sampler demands of other fields; no other sampler has `own` in `extra`."""
    chosen = {"properties": {"sampler": {"const": name}}, "required": ["sampler"]}
    rule = {"if": chosen, "then": {"properties": properties, "required": sorted(properties)}}
    other = {"properties": {"extra": {"properties": {own: False}}}}
    return {**rule, "else": other} if own else rule


def schema() -> dict[str, Any]:
    """The schema as a value."""
    sha256 = text("[0-9a-f]{64}")
    unseen = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"
    line = text(rf"[^{unseen}]{{0,{recipe.MAX_TEXT}}}")
    name = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    real = {"type": "number", "$comment": "always with a point or an exponent"}
    backbone = closed(
        {**recipe.BACKBONE_DEFAULTS, "revision": None},
        kind=text("[a-z0-9][a-z0-9._-]{0,63}"),
        repo=text(f"|{name}(/{name})?"),
        revision=text("[0-9a-f]{40}"),
        lock=sha256,
        bytes=integer(0, recipe.MAX_BACKBONE),
        licence=line,
    )
    number = {"type": "number"}
    rows = array(tuples(number, array(number, 1, recipe.MAX_ORDER)), 1, recipe.MAX_STEPS)
    section = {
        **tuples(
            text("[a-z][a-z0-9-]{0,31}"),
            {"type": "string"},
            {"type": "object"},
            text(f"[0-9a-f]{{{container.DIGEST}}}"),
        ),
        "minItems": 3,
    }
    bare = {"properties": {"prompts": {"const": False}}, "required": ["prompts"]}
    coded = closed(
        {**codes.DEFAULTS, "atoms": None, "images": None},
        atoms={
            **array(integer(0, codes.MAX_ATOMS), 1, recipe.MAX_FRESH),
            "contains": {"minimum": 1},
        },
        bits=integer(1, codes.MAX_BITS),
        codes=integer(1, reader.MAX_IMAGES),
        eta={**real, "minimum": 0, "maximum": recipe.MAX_ETA},
        guidance={**real, "minimum": -1000, "maximum": 1000},
        images=integer(1, reader.MAX_IMAGES),
        prompts={"type": "boolean"},
        sigmas=array({**real, "minimum": 0, "maximum": 1e6}, 2, recipe.MAX_FRESH + 1),
    )
    unguided = {"if": bare, "then": {"properties": {"guidance": False}}}
    section |= {
        "if": {"prefixItems": [{"const": "codes"}]},
        "then": {"prefixItems": [{}, {"const": codes.CODEC}, coded | unguided]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "d3m-1/manifest.schema.json",
        "title": "The manifest of a .d3m file, version 1",
        "$comment": "Made by spec/make_schema.py. What it cannot say, d3m-1.md says.",
        **closed(
            pack.DEFAULTS,
            d3m=tuples({"const": 1}, integer(0, 2**31 - 1)),
            requires=array({"type": "string"}, 0, 0),
            optional={"type": "object", "propertyNames": {"pattern": FEATURE}},
            classes=integer(1, reader.MAX_CLASSES),
            images_per_class=integer(1, reader.MAX_IMAGES),
            seed=text("[0-9a-f]{16}"),
            recipe=closed(
                recipe.DEFAULTS,
                backbone=backbone,
                size={**array(integer(1, recipe.MAX_SIDE), 2, 2)},
                sampler={"enum": list(recipe.SAMPLERS)},
                sigmas=array({**real, "minimum": 0, "maximum": 1e6}, 2, recipe.MAX_STEPS + 1),
                guidance={**real, "minimum": -1000, "maximum": 1000},
                guided_channels=integer(0, 1024),
                grey={"type": "boolean"},
                template={"anyOf": [{"type": "null"}, line]},
                dtype={"enum": list(recipe.DTYPES)},
                group=integer(1, recipe.MAX_GROUP),
                noise={"const": recipe.NOISE},
                extra={"type": "object"},
            )
            | {
                "allOf": [
                    sampled(
                        "ancestral",
                        "eta",
                        sigmas={"maxItems": recipe.MAX_FRESH + 1},
                        extra={
                            "required": ["eta"],
                            "properties": {"eta": {**real, "minimum": 0, "maximum": 1000}},
                        },
                    ),
                    sampled("lcm", sigmas={"maxItems": recipe.MAX_FRESH + 1}),
                    sampled(
                        "table",
                        "table",
                        extra={"required": ["table"], "properties": {"table": rows}},
                    ),
                ]
            },
            provenance={"type": "object"},
            sections={
                **array(section, len(container.REQUIRED), container.MAX_SECTIONS),
                "allOf": [
                    {"contains": {"prefixItems": [{"const": required}]}}
                    for required in container.REQUIRED
                ],
                "anyOf": [
                    {"contains": {"prefixItems": [{"const": "prompts"}]}},
                    {"contains": {"prefixItems": [{"const": "codes"}, {}, bare]}},
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
