"""Rules about meaning: what each known section holds, and which values are allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.codecs import _checks
from d3pack.format.codecs._checks import Layout, SectionSpec
from d3pack.format.codecs.adapter import check_adapter, check_adapter_values
from d3pack.format.codecs.codes import check_code_values, check_codes
from d3pack.format.codecs.labels import check_label_values, check_labels
from d3pack.format.codecs.picks import check_pick_values, check_picks
from d3pack.format.codecs.prompts import check_prompt_values, check_prompts
from d3pack.format.coded import Coded

MAX_TOTAL = 2**32
MAX_NAME = 1024
MAX_PROBES = 4096

# C0 and C1 controls, line and paragraph separators, and the marks that reverse text
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_Check = Callable[[SectionSpec, int, int], None]  # of a section, with classes and images per class


def check_specs(manifest: Mapping[str, Any]) -> None:
    """Refuse known sections whose codec, parameters or tensors are not as specified."""
    classes, images = manifest["classes"], manifest["images_per_class"]
    if classes * images > MAX_TOTAL:
        raise InvalidPackError(f"{classes * images} images, at most {MAX_TOTAL}", code="E_LIMIT")
    seeded = images  # images of a class that are made of seeds
    for section in manifest["sections"]:
        if section["name"] in _CHECKS:
            spec = SectionSpec(
                section["codec"],
                section["params"],
                {entry[0]: (entry[1], tuple(entry[2])) for entry in section["tensors"]},
                frozenset(entry[0] for entry in section["tensors"] if entry[3] == "shared"),
            )
            _CHECKS[section["name"]](
                spec, classes, seeded if section["name"] == "picks" else images
            )
            if section["name"] == "codes":
                seeded -= section["params"]["images"]


def decode_names(coded: Coded, classes: int) -> tuple[str, ...]:
    """Return the class names: UTF-8, separated by line feeds."""
    try:
        text = coded.tensors["text"].tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _name_error(f"the class names are not UTF-8: {error.reason}") from None
    control = _CONTROLS.search(text)
    if control:
        raise _name_error(f"a class name holds U+{ord(control[0]):04X}, a control character")
    names = tuple(text.split("\n"))
    if len(names) != classes:
        raise _name_error(f"{len(names)} class names for {classes} classes")
    if len(set(names)) != classes:
        raise _name_error("two classes have the same name")
    if not all(names):
        raise _name_error("a class name is empty")
    longest = max(names, key=len)
    if len(longest) > MAX_NAME // 4 and any(len(name.encode()) > MAX_NAME for name in names):
        raise _name_error(f"a class name is longer than {MAX_NAME} bytes")
    return names


def check_values(coded: Mapping[str, Coded], names: tuple[str, ...], images: int) -> None:
    """Refuse values that the sections do not allow, naming the class."""
    if "ids" in coded:
        ids = coded["ids"].tensors["ids"]
        if np.unique(ids).size != ids.size:
            raise InvalidPackError("two classes have the same id", code="E_IDS")
        if np.array_equal(ids, np.arange(ids.size)):
            raise InvalidPackError("the ids are 0, 1, 2, ... and must be left out", code="E_IDS")
    check_prompt_values(coded["prompts"], names)
    if "codes" in coded:
        check_code_values(coded["codes"], names)
    if "picks" in coded:
        check_pick_values(coded["picks"], names)
    if "labels" in coded:
        check_label_values(coded["labels"], names)
    if "adapter" in coded:
        check_adapter_values(coded["adapter"])
    if "probes" in coded:
        tensors = coded["probes"].tensors
        pairs = list(zip(tensors["labels"].tolist(), tensors["indices"].tolist(), strict=True))
        for label, index in pairs:
            if label >= len(names) or index >= images:
                raise InvalidPackError(
                    f"a probe of image {index} of class {label} is beyond the pack", code="E_PROBE"
                )
        if len(set(pairs)) != len(pairs):
            raise InvalidPackError("two probes of the same image", code="E_PROBE")


def _name_error(message: str) -> InvalidPackError:
    return InvalidPackError(message, code="E_NAME")


def _check_plain(
    name: str, codec: str, layout: Callable[[SectionSpec, int], Layout], *, shared: bool = True
) -> _Check:
    """Return the check of a section with one codec and no parameters."""

    def check(spec: SectionSpec, classes: int, images: int) -> None:
        if spec.codec != codec:
            raise InvalidPackError(f"{name}: unknown codec {spec.codec!r:.80}", code="E_CODEC")
        _checks.check_keys(spec.params, name, set())
        tensors = layout(spec, classes)
        _checks.check_tensors(spec, name, tensors, frozenset(tensors) if shared else frozenset())

    return check


def _text_layout(spec: SectionSpec, classes: int) -> Layout:
    size = math.prod(spec.tensors["text"][1]) if "text" in spec.tensors else 0
    return {"text": ("U8", (size,))}


def _probe_layout(spec: SectionSpec, classes: int) -> Layout:
    shape = spec.tensors.get("images", ("", ()))[1]
    if len(shape) != 4:
        raise InvalidPackError("probes.images: must be [probes, 3, height, width]", code="E_SHAPE")
    count, _, height, width = shape
    if count > MAX_PROBES:
        raise InvalidPackError(f"{count} probes, at most {MAX_PROBES}", code="E_LIMIT")
    return {
        "images": ("U8", (count, 3, height, width)),
        "labels": ("U32", (count,)),
        "indices": ("U32", (count,)),
    }


_CHECKS: dict[str, _Check] = {
    "classes": _check_plain("classes", "utf8", _text_layout),
    "leaves": _check_plain("leaves", "sha256-128", lambda _, count: {"hash": ("U8", (count, 16))}),
    "ids": _check_plain("ids", "u32", lambda _, count: {"ids": ("U32", (count,))}, shared=False),
    "prompts": lambda spec, classes, images: check_prompts(spec, classes),
    "codes": check_codes,
    "picks": check_picks,
    "labels": check_labels,
    "adapter": lambda spec, classes, images: check_adapter(spec),
    "probes": _check_plain("probes", "u8", _probe_layout),
}
