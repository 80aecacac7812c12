"""Rules about meaning: what each known section holds, and which values are allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.codecs._checks import (
    Layout,
    SectionSpec,
    Tensor,
    check_codec,
    check_integer,
    check_keys,
    check_shape,
)
from d3pack.format.codecs.adapter import check_adapter_values, layout_adapter
from d3pack.format.codecs.codes import check_code_values, code_defaults, layout_codes
from d3pack.format.codecs.labels import check_label_values, layout_labels
from d3pack.format.codecs.picks import check_pick_values, layout_picks
from d3pack.format.codecs.prompts import check_prompt_values, layout_prompts
from d3pack.format.codecs.weights import check_weight_values, layout_weights
from d3pack.format.coded import Coded
from d3pack.format.recipe import MAX_SIDE

MAX_DATA = 2**40
MAX_TOTAL = 2**32
MAX_NAME = 1024
MAX_PROBES = 4096

# C0 and C1 controls, line and paragraph separators, and the marks that reverse text
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def _no_defaults(params: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


class Section(NamedTuple):
    """How a section is stored: its tensors follow from codec, parameters, classes and images."""

    layout: Callable[[SectionSpec, int, int], Layout]  # checks codec and parameters
    implied: tuple[str, ...] = ()  # parameters that follow from the pack and are not stored
    # parameters that are left out where they have these values
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _no_defaults


def check_total(classes: int, images: int) -> None:
    """Refuse more images than the counter of a dataset has."""
    if classes * images > MAX_TOTAL:
        raise InvalidPackError(f"{classes * images} images, at most {MAX_TOTAL}", code="E_LIMIT")


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


def check_name(name: str) -> None:
    """Raise `InvalidPackError` (E_NAME) unless a class can have the name."""
    if not name or "\n" in name:
        raise _name_error("a class name holds a line feed" if name else "a class name is empty")
    text = np.frombuffer(name.encode("utf-8", "surrogatepass"), np.uint8)
    decode_names(Coded("utf8", {"text": text}, {"bytes": text.size}, frozenset({"text"})), 1)


def check_values(coded: Mapping[str, Coded], names: tuple[str, ...], images: int) -> None:
    """Refuse values that the sections do not allow, naming the class."""
    if "ids" in coded:
        ids = coded["ids"].tensors["ids"]
        if np.unique(ids).size != ids.size:
            raise InvalidPackError("two classes have the same id", code="E_IDS")
        if np.array_equal(ids, np.arange(ids.size)):
            raise InvalidPackError("the ids are 0, 1, 2, ... and must be left out", code="E_IDS")
    for name in ("prompts", "unconditional"):
        if name in coded:
            check_prompt_values(coded[name], names, name)
    if "codes" in coded:
        check_code_values(coded["codes"], names)
    if "picks" in coded:
        check_pick_values(coded["picks"], names)
    if "labels" in coded:
        check_label_values(coded["labels"], names)
    if "weights" in coded:
        check_weight_values(coded["weights"])
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


def layout_opaque(spec: SectionSpec, classes: int, name: str) -> Layout:
    """Return the tensors of a section of a newer minor version: its bytes, whatever they mean."""
    layout = {}
    for key, tensor in (("row", "rows"), ("shared", "shared")):
        if key in spec.params:
            size = check_integer(spec.params, key, name, 1, MAX_DATA)
            is_shared = key == "shared"
            layout[tensor] = Tensor("U8", (size,) if is_shared else (classes, size), is_shared)
    if not layout:
        raise InvalidPackError(f"{name}.params: must have row, shared or both", code="E_CODEC")
    return layout


def _layout_names(spec: SectionSpec, classes: int, images: int) -> Layout:
    check_codec(spec, "utf8", "classes")
    check_keys(spec.params, "classes", {"bytes"})
    size = check_integer(spec.params, "bytes", "classes", 1, MAX_DATA)
    return {"text": Tensor("U8", (size,), is_shared=True)}


def _layout_leaves(spec: SectionSpec, classes: int, images: int) -> Layout:
    check_codec(spec, "sha256-128", "leaves")
    check_keys(spec.params, "leaves", set())
    return {"hash": Tensor("U8", (classes, 16), is_shared=True)}


def _layout_ids(spec: SectionSpec, classes: int, images: int) -> Layout:
    check_codec(spec, "u32", "ids")
    check_keys(spec.params, "ids", set())
    return {"ids": Tensor("U32", (classes,))}


def _layout_unconditional(spec: SectionSpec, classes: int, images: int) -> Layout:
    layout = layout_prompts(spec, 1, images, "unconditional")
    return {name: tensor._replace(is_shared=True) for name, tensor in layout.items()}


def _layout_probes(spec: SectionSpec, classes: int, images: int) -> Layout:
    check_codec(spec, "u8", "probes")
    check_keys(spec.params, "probes", {"shape"})
    limits = (MAX_PROBES, MAX_SIDE, MAX_SIDE)
    count, height, width = check_shape(spec.params, "probes", limits)
    return {
        "images": Tensor("U8", (count, 3, height, width), is_shared=True),
        "labels": Tensor("U32", (count,), is_shared=True),
        "indices": Tensor("U32", (count,), is_shared=True),
    }


SECTIONS: dict[str, Section] = {  # in the order of the file
    "classes": Section(_layout_names),
    "leaves": Section(_layout_leaves),
    "ids": Section(_layout_ids),
    "prompts": Section(layout_prompts),
    "unconditional": Section(_layout_unconditional),
    "codes": Section(layout_codes, defaults=code_defaults),
    "picks": Section(layout_picks, implied=("images",)),
    "labels": Section(layout_labels, implied=("classes", "images")),
    "weights": Section(layout_weights),
    "adapter": Section(layout_adapter),
    "probes": Section(_layout_probes),
}
