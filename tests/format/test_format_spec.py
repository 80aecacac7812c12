"""The specification says what the code does: schema, tables, hexdump, vectors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jsonschema
import make_errors
import make_hexdump
import make_schema
import pytest
import reader
from draft import Draft
from format_packs import VALID, VECTORS, full, make
from places import ROOT

import d3pack
from d3pack.decode import noise, samplers
from d3pack.errors import CODES, InvalidPackError
from d3pack.format import canonical, coded, container, pack, recipe, rules
from d3pack.format import reader as ours
from d3pack.format.codecs import (
    ADAPTER_CODECS,
    LABEL_CODECS,
    PROMPT_CODECS,
    adapter,
    codes,
    labels,
    picks,
    prompts,
)

SPEC = (ROOT / "spec" / "d3m-1.md").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "spec" / "manifest.schema.json").read_text())
INDEX = json.loads((VECTORS / "index.json").read_text())
CHECKER = jsonschema.Draft202012Validator(SCHEMA)


def section(number: int | str) -> str:
    return SPEC.split(f"\n## {number}. ")[1].split("\n## ")[0]


def table(number: int | str) -> list[list[str]]:
    rows = [line for line in section(number).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_schema_is_made_from_the_code_and_valid() -> None:
    assert make_schema.schema() == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_dtypes_are_those_of_both_readers() -> None:
    named = re.search(r"have the dtypes `([^`]+)`", SPEC)
    assert named is not None
    assert named[1].split() == list(coded.DTYPES) == list(reader.FORMS)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_schema_accepts_valid_manifests(path: Any) -> None:
    CHECKER.validate(Draft(path.read_bytes()).manifest)


def test_schema_refuses_invalid_manifests() -> None:
    """All of E_MANIFEST, E_VERSION and E_FEATURE, and nearly all of E_RECIPE and E_SECTION."""
    unsaid = {
        "images-real", "recipe-guidance",
        "recipe-sigmas-integer", "recipe-sigmas-ascend", "recipe-sigmas-equal", "recipe-sigmas-end",
        "recipe-sigmas-minus", "recipe-sigmas-close", "recipe-sigmas-tiny", "recipe-table-few",
        "recipe-table-back", "default-backbone-revision", "recipe-template", "section-order",
        "section-twice", "section-unknown", "section-pad", "section-hash-missing",
        "section-hash-needless", "backbone-size-real", "recipe-ancestral-integer",
        "recipe-ancestral-minus-zero", "recipe-guidance-minus",
        "codes-prompts-unused", "section-prompts-missing",
    }  # fmt: skip
    codes = {"E_MANIFEST", "E_VERSION", "E_FEATURE", "E_RECIPE", "E_SECTION"}
    tried = 0
    for name, entry in INDEX["invalid"].items():
        if (entry["code"] in codes or name.startswith("default-")) and name not in unsaid:
            data = (VECTORS / "invalid" / f"{name}.d3m").read_bytes()
            size = int.from_bytes(data[:8], "little")
            manifest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["d3m"])
            assert not CHECKER.is_valid(manifest), name
            tried += 1
    assert tried > 50


def test_schema_code_and_text_have_the_same_fields() -> None:
    assert set(SCHEMA["properties"]) == ours.FIELDS
    assert set(full().manifest) | set(pack.DEFAULTS) == ours.FIELDS
    assert {row[0].strip("`") for row in table(3)[:10]} == ours.FIELDS
    fields = SCHEMA["properties"]["recipe"]["properties"]
    stored = full().recipe.to_json()
    assert set(stored) == set(fields)
    inner = {f"backbone.{name}" for name in stored["backbone"]}
    assert {row[0].strip("`") for row in table(5)[:17]} == inner | set(fields) - {"backbone"}


def test_tables_of_defaults_match_the_code() -> None:
    told = {row[0].strip("`"): row[1].strip("`") for row in [*table(3)[:10], *table(5)[:17]]}
    backbone = {f"backbone.{name}": value for name, value in recipe.BACKBONE_DEFAULTS.items()}
    defaults = {**pack.DEFAULTS, **recipe.DEFAULTS, **backbone}
    want = {name: canonical.dumps(value) for name, value in defaults.items()}
    assert told.pop("backbone.revision") == "the first 40 digits of `lock"
    assert {name: value for name, value in told.items() if value} == want
    assert reader.DEFAULTS == pack.DEFAULTS
    assert reader.RECIPE_DEFAULTS == recipe.DEFAULTS
    assert reader.BACKBONE_DEFAULTS == recipe.BACKBONE_DEFAULTS


def test_defaults_of_codes_match_the_code() -> None:
    told = {row[0].strip("`"): row[1].strip("`") for row in table("6a")}
    assert set(told) == codes.KEYS
    assert (told.pop("atoms"), told.pop("images")) == ("T times 1", "the value of `codes")
    want = {name: canonical.dumps(value) for name, value in codes.DEFAULTS.items()}
    assert {name: value for name, value in told.items() if value} == want
    usual = asdict(codes.Coding((1.0, 0.0), (1,)))
    assert {name: usual[name] for name in codes.DEFAULTS} == codes.DEFAULTS
    assert codes.code_defaults({"sigmas": [2.0, 1.0, 0.0], "codes": 3}) == reader.code_defaults(
        {"sigmas": [2.0, 1.0, 0.0], "codes": 3}
    )


def test_recipe_without_its_defaults_is_the_same() -> None:
    lean = full().manifest["recipe"]
    assert not set(lean) & {"dtype", "extra", "group", "guided_channels", "noise", "template"}
    assert recipe.Recipe.from_json(lean) == full().recipe
    short = recipe.Recipe(full().recipe.backbone, (8, 8), "dpmpp-2m", (1.0, 0.0)).to_json()
    assert {name: short[name] for name in recipe.DEFAULTS} == recipe.DEFAULTS


def test_table_of_errors_is_made_from_the_codes() -> None:
    made = SPEC.partition(make_errors.BEGIN)[2].partition(make_errors.END)[0]
    assert made.strip() == make_errors.table().strip()


def test_table_of_errors_lists_every_code() -> None:
    rules_of_code = {code for code, (name, _) in CODES.items() if name == "InvalidPackError"}
    codes = [row[0].strip("`") for row in table(11)]
    assert set(codes) == rules_of_code - {InvalidPackError.code}
    assert len(codes) == len(set(codes))


LIMITS = {
    "header bytes": container.MAX_HEADER,
    "commas, `[` and `{` in the header": container.MAX_MARKS,
    "bytes of data": rules.MAX_DATA,
    "classes": ours.MAX_CLASSES,
    "images per class": ours.MAX_IMAGES,
    "images": rules.MAX_TOTAL,
    "sections": container.MAX_SECTIONS,
    "bytes of a class name": rules.MAX_NAME,
    "modes": prompts.MAX_MODES,
    "vectors of a prompt": prompts.MAX_VECTORS,
    "values of a vector": prompts.MAX_WIDTH,
    "codebook entries": prompts.CODEBOOK,
    "bits of a pick": picks.MAX_BITS,
    "bits of a picked set": picks.MAX_SET_BITS,
    "levels of a code": recipe.MAX_FRESH,
    "bits of the number of a codebook's entries": codes.MAX_BITS,
    "atoms of a level": codes.MAX_ATOMS,
    "bits of a label code": labels.MAX_BITS,
    "octaves of a label": labels.MAX_OCTAVES,
    "tensors of an adapter": adapter.MAX_TENSORS,
    "dimensions of a tensor of an adapter": adapter.MAX_DIMS,
    "one of these dimensions": adapter.MAX_SIDE,
    "probes": rules.MAX_PROBES,
    "steps": recipe.MAX_STEPS,
    "steps of `ancestral` and `lcm`": recipe.MAX_FRESH,
    "pixels of a side": recipe.MAX_SIDE,
    "group": recipe.MAX_GROUP,
    "bytes of a backbone": recipe.MAX_BACKBONE,
    "characters of a template or licence": recipe.MAX_TEXT,
    "levels of JSON": canonical.MAX_DEPTH,
}


def test_table_of_limits_matches_the_code() -> None:
    assert {row[0]: int(row[2]) for row in table(4)} == LIMITS


def _recipe(**changes: Any) -> Callable[[Draft], Any]:
    return lambda draft: draft.manifest["recipe"].update(changes)


def _params(section: str, **changes: Any) -> Callable[[Draft], Any]:
    return lambda draft: draft.params(section).update(changes)


BEYOND: dict[str, str | tuple[str, Callable[[Draft], Any]]] = {  # a corpus file, or one edited
    "header bytes": "length-over-cap",
    "commas, `[` and `{` in the header": (
        "prompts-f16",
        lambda draft: draft.manifest.update(provenance={"a": [[]] * (container.MAX_MARKS // 2)}),
    ),
    "bytes of data": "adapter-data",
    "classes": "classes-many",
    "images per class": "images-many",
    "images": "images-total",
    "sections": "section-many",
    "bytes of a class name": "name-long",
    "modes": ("prompts-f16", _params("prompts", shape=[4097, 1, 32])),
    "vectors of a prompt": ("prompts-f16", _params("prompts", shape=[1, 1025, 32])),
    "values of a vector": "prompts-shape-large",
    "codebook entries": "prompts-entries-many",
    "bits of a pick": "picks-bits",
    "bits of a picked set": "picks-sets-bits",
    "levels of a code": ("codes", _params("codes", sigmas=[*map(float, range(257, -1, -1))])),
    "bits of the number of a codebook's entries": "codes-bits",
    "atoms of a level": ("codes", _params("codes", bits=11, atoms=[1025, 1, 1, 1, 1])),
    "bits of a label code": ("labels-topk", _params("labels", bits=13)),
    "octaves of a label": "labels-octaves",
    "tensors of an adapter": (
        "adapter-i8",
        _params("adapter", table=[[f"t{i:05d}", [1]] for i in range(16385)]),
    ),
    "dimensions of a tensor of an adapter": "adapter-dims",
    "one of these dimensions": "adapter-side-large",
    "probes": "probes-many",
    "steps": "recipe-sigmas-many",
    "steps of `ancestral` and `lcm`": "recipe-lcm-many",
    "pixels of a side": ("prompts-f16", _recipe(size=[8193, 8])),
    "group": ("prompts-f16", _recipe(group=1025)),
    "bytes of a backbone": "backbone-size-large",
    "characters of a template or licence": ("prompts-f16", _recipe(template="x" * 1025)),
    "levels of JSON": "manifest-nested-deep",
}


@pytest.mark.parametrize("row", table(4), ids=lambda row: row[0])
def test_exceeded_limits_are_refused_with_their_code(row: list[str]) -> None:
    made = BEYOND[row[0]]
    if isinstance(made, str):
        data = (VECTORS / "invalid" / f"{made}.d3m").read_bytes()
    else:
        source, edit = made
        draft = Draft((VECTORS / "valid" / f"{source}.d3m").read_bytes())
        edit(draft)
        data = draft.reroot().bytes()
    code = row[3].strip("`")
    with pytest.raises(InvalidPackError) as caught:
        d3pack.read(data)
    assert caught.value.code == code
    with pytest.raises(reader.Refused) as other:
        reader.read(data)
    assert other.value.code == code


def test_tables_of_sections_and_codecs_match_the_code() -> None:
    heads = ("section", "---", "or")  # "or": another codec of the section above
    names = [row[0].strip("`") for row in table(3)[10:] if row[0] not in heads]
    assert tuple(names) == (*container.KNOWN, "any other")
    assert [row[0].strip("`") for row in table(6)] == list(PROMPT_CODECS)
    assert [row[0].strip("`") for row in table(8)] == list(ADAPTER_CODECS)
    assert all(f"**`{codec}`**" in section(7) for codec in LABEL_CODECS)
    assert reader.CODECS.keys() == set(container.KNOWN)


def test_every_codec_is_known_to_all_readers_and_stands_in_the_corpus() -> None:
    ours = {
        "prompts": list(PROMPT_CODECS),
        "unconditional": list(PROMPT_CODECS),
        "labels": list(LABEL_CODECS),
        "adapter": list(ADAPTER_CODECS),
    }
    second = {name: codecs.split() for name, codecs in reader.CODECS.items()}
    assert ours == {name: second[name] for name in ours}
    source = (ROOT / "viewer" / "src" / "reader.ts").read_text(encoding="utf-8")
    body = source.split("const CODECS: Record<string, string[]> = {\n")[1].split("\n};")[0]
    third = {name: json.loads(names) for name, names in re.findall(r"(\w+): (\[.*\]),", body)}
    assert third == second
    packs = [d3pack.read(path) for path in VALID]
    stored = {
        (name, part.codec)
        for pack in packs
        for name in second
        if isinstance(part := getattr(pack, name, None), coded.Coded)
    }
    asked = {(name, codec) for name in ("prompts", "labels", "adapter") for codec in ours[name]}
    assert asked <= stored, "add a pack to spec/make_vectors.py"


def test_noise_matches_the_text() -> None:
    assert noise.TABLE_SHA256 in section(9)
    assert recipe.NOISE in section(5)
    assert f"{noise.STEPS}·epoch" in section(9)
    for counter, key, answer in table(9):
        seed = int("".join(reversed(key.split())), 16)
        import numpy as np

        words = noise.philox([np.array([int(w, 16)], np.uint64) for w in counter.split()], seed)
        assert " ".join(f"{int(word[0]):08x}" for word in words) == answer


def test_table_of_samplers_matches_the_code() -> None:
    sigmas = (10.0, 4.0, 1.0, 0.0)
    euler = samplers.plan("euler", sigmas)
    assert samplers.plan("ddim", sigmas) == euler
    for step, s, t in zip(euler, sigmas, sigmas[1:], strict=False):
        assert (step.a, step.b, step.c) == (t / s, (1 - t / s,), 0)
    second = samplers.plan("dpmpp-2m", sigmas)
    assert (second[0], second[2]) == (euler[0], euler[2])
    r, h = 1 / 4, 0.5 * math.log(4 / 1) / math.log(10 / 4)
    assert second[1].a == r
    assert second[1].b == pytest.approx(((1 - r) * (1 + h), -(1 - r) * h))
    assert [(s.a, s.b, s.c) for s in samplers.plan("lcm", sigmas)] == [
        (0, (1,), t) for t in sigmas[1:]
    ]
    names = " ".join(row[0] for row in table(5)[17:])
    assert all(f"`{name}`" in names for name in recipe.SAMPLERS)


def test_hexdump_matches_the_smallest_pack() -> None:
    data = (VECTORS / "valid" / "smallest.d3m").read_bytes()
    told = SPEC.partition(make_hexdump.MARK)[2]
    assert told.strip() == make_hexdump.explain(data).strip()
    shown = re.findall(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} ?)+)", told, flags=re.M)
    assert bytes.fromhex("".join(shown)) == data
    spans = re.findall(r"^\| (0x[0-9a-f]+) to (0x[0-9a-f]+) \|", told, flags=re.M)
    assert len(spans) > 10
    assert len(data) == min(p.stat().st_size for p in VALID)


def test_root_matches_the_text() -> None:
    manifest = Draft(d3pack.pack_bytes(make())).manifest
    rest = {name: value for name, value in manifest.items() if name != "root"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == manifest["root"]


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1.0, 1e-4, 1e-5, 1e15, 1e16, 0.1, 5e-324, 1.7976931348623157e308, 123456.789],
)
def test_spelling_of_reals_matches_the_text(value: float) -> None:
    text = canonical.dumps(value)
    assert float(text) == value
    digits = re.fullmatch(r"-?(\d+)\.(\d+)|-?\d(?:\.\d+)?e([+-]\d{2,3})", text)
    assert digits, text
    if digits[3]:
        assert not -4 <= int(digits[3]) <= 15


def test_spelling_of_strings_matches_the_text() -> None:
    text = canonical.dumps('"\\/\b\f\n\r\t\x00\x1f ~\x7f\u00e9\u2028\U0001f408')
    assert text == ('"\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f ~\\u007f\\u00e9\\u2028\\ud83d\\udc08"')
