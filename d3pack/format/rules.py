"""Rules about meaning: what each known section must look like, and what its values may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from d3pack.errors import InvalidPackError
from d3pack.format.codecs import adapter, labels, picks, prompts
from d3pack.format.codecs import params as p
from d3pack.format.coded import Coded

MAX_TOTAL = 2**32
MAX_NAME = 1024
MAX_PROBES = 4096

# C0 and C1 controls, line and paragraph separators, and the marks that turn text around.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def check_sections(manifest: Mapping[str, Any]) -> None:
    """Refuse known sections whose codec, parameters or tensors are not as specified."""
    classes, images = manifest["classes"], manifest["images_per_class"]
    if classes * images > MAX_TOTAL:
        raise InvalidPackError(f"{classes * images} images, at most {MAX_TOTAL}", code="E_LIMIT")
    for section in manifest["sections"]:
        form = p.Form(
            section["codec"],
            section["params"],
            {entry[0]: (entry[1], tuple(entry[2])) for entry in section["tensors"]},
            frozenset(entry[0] for entry in section["tensors"] if entry[3] == "shared"),
        )
        name = section["name"]
        if name == "prompts":
            prompts.check_prompts(form, classes)
        elif name == "picks":
            picks.check_picks(form, classes, images)
        elif name == "labels":
            labels.check_labels(form, classes, images)
        elif name == "adapter":
            adapter.check_adapter(form)
        elif name in _PLAIN:
            codecs, layout = _PLAIN[name]
            if form.codec not in codecs:
                raise InvalidPackError(f"{name}: unknown codec {form.codec!r:.80}", code="E_CODEC")
            p.keys(form.params, name, set())
            tensors = layout(form, classes, images)
            shared = frozenset() if name == "ids" else frozenset(tensors)
            p.tensors(form, name, tensors, shared)


def class_names(coded: Coded, classes: int) -> tuple[str, ...]:
    """The class names: UTF-8, one a line, the last one without its line end."""
    try:
        text = coded.tensors["text"].tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidPackError(
            f"the class names are not UTF-8: {error.reason}", code="E_NAME"
        ) from None
    control = _CONTROLS.search(text)
    if control:
        raise InvalidPackError(
            f"a class name holds U+{ord(control[0]):04X}, a control character", code="E_NAME"
        )
    names = tuple(text.split("\n"))
    if len(names) != classes:
        raise InvalidPackError(f"{len(names)} class names for {classes} classes", code="E_NAME")
    if len(set(names)) != classes:
        raise InvalidPackError("two classes have the same name", code="E_NAME")
    if not all(names):
        raise InvalidPackError("a class name is empty", code="E_NAME")
    longest = max(names, key=len)
    if len(longest) > MAX_NAME // 4 and any(len(name.encode()) > MAX_NAME for name in names):
        raise InvalidPackError(f"a class name is longer than {MAX_NAME} bytes", code="E_NAME")
    return names


def check_values(coded: Mapping[str, Coded], names: tuple[str, ...], images: int) -> None:
    """Refuse values without a meaning, naming the class."""
    if "ids" in coded:
        ids = coded["ids"].tensors["ids"]
        if np.unique(ids).size != ids.size:
            raise InvalidPackError("two classes have the same id", code="E_IDS")
        if np.array_equal(ids, np.arange(ids.size)):
            raise InvalidPackError("the ids are 0, 1, 2, ... and must be left out", code="E_IDS")
    prompts.check_prompt_values(coded["prompts"], names)
    if "picks" in coded:
        picks.check_pick_values(coded["picks"], names)
    if "labels" in coded:
        labels.check_label_values(coded["labels"], names)
    if "adapter" in coded:
        adapter.check_adapter_values(coded["adapter"])
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


def _classes(form: p.Form, classes: int, images: int) -> p.Layout:
    size = math.prod(form.tensors["text"][1]) if "text" in form.tensors else 0
    return {"text": ("U8", (size,))}


def _leaves(form: p.Form, classes: int, images: int) -> p.Layout:
    return {"hash": ("U8", (classes, 16))}


def _ids(form: p.Form, classes: int, images: int) -> p.Layout:
    return {"ids": ("U32", (classes,))}


def _probes(form: p.Form, classes: int, images: int) -> p.Layout:
    shape = form.tensors.get("images", ("", ()))[1]
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


_PLAIN: dict[str, tuple[tuple[str, ...], Callable[[p.Form, int, int], p.Layout]]] = {
    "classes": (("utf8",), _classes),
    "leaves": (("sha256-128",), _leaves),
    "ids": (("u32",), _ids),
    "probes": (("u8",), _probes),
}
