"""The values a `.d3m` file holds. Immutable: every operation gives a new Pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from d3pack.recipe import Recipe

Array = npt.NDArray[Any]
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Coded:
    """Values as a codec stored them: the bytes of the file, not their meaning (see `d3pack.codecs`)."""

    codec: str
    tensors: Mapping[str, Array]  # first axis is the class axis unless the codec says "shared"
    params: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)  # shape, errors, bits, k, ...


@dataclass(frozen=True, slots=True)
class Probes:
    """Small reference images rebuilt by `verify --decode`."""

    images: Array  # uint8 (P, 3, h, w)
    labels: Array  # uint16/uint32 (P,) class of each
    indices: Array  # uint32 (P,) image index within the class


@dataclass(frozen=True, slots=True)
class Pack:
    """A dataset as a recipe."""

    classes: tuple[str, ...]
    images_per_class: int
    recipe: Recipe
    prompts: Coded  # decodes to float32 (C, m, k, D)
    seed: int  # 64 bit; keys the noise of every image
    picks: Array | None = None  # curated candidate index of image i of class c: uint8/uint16 (C, n)
    labels: Coded | None = None  # decodes to float32 (C, n, C)
    adapter: Coded | None = None  # named tensors that tune the backbone
    probes: Probes | None = None
    provenance: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
