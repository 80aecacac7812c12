"""Packs for the tests of the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from places import ROOT

from d3pack import BackboneRef, Coded, FileLock, Pack, Probes, Recipe
from d3pack.format.codecs import encode_adapter, encode_labels, encode_picks, encode_prompts

VECTORS = ROOT / "spec" / "vectors"
VALID = sorted((VECTORS / "valid").glob("*.d3m"))
RECIPE = Recipe(
    BackboneRef("dit", "org/name", "0f" * 20, {"config.json": FileLock(12, "ab" * 32)}, "mit"),
    (32, 48),
    "euler",
    (3.0, 1.0, 0.0),
    guidance=1.5,
)


def make(classes: int = 5, images: int = 6, codec: str = "f16", **changes: Any) -> Pack:
    """A pack of random values; `labels`, `picks`, `adapter`, `probes` may be True."""
    rng = np.random.default_rng(classes * 1000 + images)
    values = rng.normal(0, 0.05, (classes, 2, 3, 40)).astype(np.float32)
    made: dict[str, Callable[[], Any]] = {
        "picks": lambda: encode_picks([rng.permutation(250)[:images] for _ in range(classes)]),
        "labels": lambda: encode_labels(
            rng.dirichlet(np.full(classes, 0.3), (classes, images)), k=3
        ),
        "adapter": lambda: encode_adapter({"a.delta": rng.normal(size=(3, 4))}, "i8"),
        "probes": lambda: Probes(
            rng.integers(0, 256, (3, 3, 8, 8)).astype(np.uint8),
            np.arange(3) % classes,
            np.arange(3) % images,
        ),
    }
    for name, value in made.items():
        if changes.get(name) is True:
            changes[name] = value()
    return Pack(
        classes=changes.pop("names", tuple(f"class {i}" for i in range(classes))),
        images_per_class=images,
        recipe=changes.pop("recipe", RECIPE),
        prompts=encode_prompts(values, codec),
        seed=changes.pop("seed", 77),
        **changes,
    )


def full(**changes: Any) -> Pack:
    """A pack with every section."""
    return make(picks=True, labels=True, adapter=True, probes=True, **changes)


def stored(section: Coded | None) -> Coded:
    """Return a section that the pack has."""
    assert section is not None
    return section
