"""What plans of all methods are made of: dials, sigmas, and the size of the pack they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from d3pack.backbones import Backbone
from d3pack.decode.samplers import schedule
from d3pack.encode.options import LabelKind, label_kind
from d3pack.encode.seeds import candidates_of, lanes_of
from d3pack.format import pack_bytes
from d3pack.format.codecs import encode_labels, encode_picks, encode_prompts
from d3pack.format.pack import Pack, Probes
from d3pack.format.recipe import DType, Recipe, Sampler
from d3pack.sources import Source
from d3pack.system.text import count

SMALL = 64  # pixels; up to this side a collage would leave nothing to see in a patch
PROBE = 8  # side of a stored probe, where the image size allows it
PICKY = 8  # candidates for each image, where making them is cheap ...
SHARE = 8  # ... by so many together: with eight times eight to choose from, six bits say which


@dataclass(frozen=True, slots=True)
class Dials:
    """What the bytes of a pack are spent on."""

    modes: int = 1
    vectors: int = 1
    codec: str = "i4"
    candidates: int = 1  # for each image; 1: derived seeds
    share: int = 1  # images that choose among the candidates of all of them, for more bits each
    labels: str = "none"
    probes: int = 1

    @property
    def prompts(self) -> str:
        """What a class is told by, in words."""
        return f"{count(self.modes, 'mode')} of {count(self.vectors, 'vector')} as {self.codec}"

    def seeds(self, images_per_class: int) -> str:
        """How they are found, in words."""
        if self.candidates == 1:
            return "seeds derived"
        lanes = lanes_of(images_per_class, self.modes, self.share)
        every = candidates_of(images_per_class, self.modes, self.candidates, self.share)
        return f"seeds best {-(-images_per_class // lanes)} of {every // lanes}"


def typical_side(source: Source) -> int:
    """Median shorter side of the first readable image of up to 16 classes."""
    sides = []
    for c in np.linspace(0, len(source.classes) - 1, min(16, len(source.classes))).astype(int):
        for i in range(min(4, source.counts[c])):
            image = source.get(int(c), i)
            if image is not None:
                sides.append(min(image.size))
                break
    return int(np.median(sides)) if sides else SMALL


def dtype_for(device: str) -> DType:
    """Of the models: only accelerators gain from the narrow one."""
    return "float32" if device.startswith("cpu") else "bfloat16"


def sigmas_of(backbone: Backbone, sampler: Sampler, steps: int) -> tuple[float, ...]:
    """The noise levels of a backbone that so many steps pass through."""
    return short(schedule(backbone.levels.alphas_cumprod, sampler, steps))


def short(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """Seven digits: a hundred times nearer than a level needs to be found, and half the bytes."""
    return tuple(float(f"{sigma:.7g}") for sigma in sigmas)


def size_of(
    classes: tuple[str, ...],
    images_per_class: int,
    recipe: Recipe,
    width: int,
    dials: Dials,
    provenance: Mapping[str, Any],
    seed: int,
) -> int:
    """Bytes of a pack: one of the same shapes, filled with random values, is written in memory."""
    count, n = len(classes), images_per_class
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, dials.modes, dials.vectors, width), np.float32)
    picks = None
    if dials.candidates > 1:
        lanes = lanes_of(n, dials.modes, dials.share)
        deepest = candidates_of(n, dials.modes, dials.candidates, dials.share) // lanes - 1
        codes = np.arange(n) // lanes
        codes[-1] = deepest
        picks = encode_picks(np.tile(np.arange(n) % lanes + codes * lanes, (count, 1)), lanes)
    kind, k = label_kind(dials.labels)
    probes = None
    if dials.probes:
        place = np.arange(dials.probes)
        probes = Probes(
            np.zeros((dials.probes, 3, PROBE, PROBE), np.uint8), place % count, place // count % n
        )
    pack = Pack(
        classes=classes,
        images_per_class=n,
        recipe=recipe,
        prompts=encode_prompts(values, dials.codec),
        seed=seed,
        picks=picks,
        labels=None,
        probes=probes,
        provenance=provenance,
    )
    return len(pack_bytes(pack)) + _label_bytes(count, n, kind, k)


def _label_bytes(classes: int, n: int, kind: LabelKind, k: int) -> int:
    """Labels of two classes, scaled: a table of a thousand is not built to be measured."""
    if kind == "none":
        return 0
    probs = np.full((2, n, classes), 1.0 / classes)
    coded = encode_labels(probs, "topk" if kind == "topk" else "dense", **({"k": k} if k else {}))
    return coded.nbytes * classes // 2 + 400  # and its entry in the manifest
