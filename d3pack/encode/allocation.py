"""What the bytes of a pack are spent on: how a budget is spent, and how large a pack will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from d3pack.encode.candidates import candidates_of, lanes_of
from d3pack.encode.settings import EncodeSettings, parse_labels
from d3pack.errors import UsageError
from d3pack.format import (
    Pack,
    Probes,
    Recipe,
    encode_labels,
    encode_picks,
    encode_prompts,
    pack_bytes,
)
from d3pack.system import count

PROBE = 8  # side of a stored probe, where the size of the images allows it
PICKY = 8  # candidates for each image where making them is cheap ...
SHARE = 8  # ... shared by so many images: of eight times eight, six bits say which
MARGIN = 200  # bytes: measured figures in the manifest have more or fewer digits


@dataclass(frozen=True, slots=True)
class Allocation:
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
        """What is stored of a class, in words."""
        return f"{count(self.modes, 'mode')} of {count(self.vectors, 'vector')} as {self.codec}"

    def seeds(self, images_per_class: int) -> str:
        """How seeds are chosen, in words."""
        if self.candidates == 1:
            return "seeds derived"
        lanes = lanes_of(images_per_class, self.modes, self.share)
        total = candidates_of(images_per_class, self.modes, self.candidates, self.share)
        return f"seeds best {-(-images_per_class // lanes)} of {total // lanes}"


SMALLEST = Allocation(modes=1, vectors=1, codec="i4", candidates=1, labels="none", probes=0)

# What to buy next, most valuable first. What does not fit is passed over; the next may still fit.
# On students of mini's images (benchmarks/encode_ablation.py) picked seeds bring five points for
# their bytes, and half a point more where images share candidates; more vectors, more modes and
# soft labels bring less than three students' noise.
LADDER: tuple[tuple[str, Any], ...] = (
    ("candidates", 4),
    ("candidates", PICKY),
    ("share", SHARE),
    ("probes", 1),
    ("vectors", 2),
    ("vectors", 4),
    ("modes", 2),
    ("modes", 4),
    ("modes", 8),
    ("codec", "i8"),
    ("codec", "f16"),
    ("labels", "top3"),
    ("labels", "top10"),
    ("labels", "dense"),
)


def spend(
    budget: int,
    fixed: Mapping[str, Any],
    most_vectors: int,
    size_of: Callable[[Allocation], int],
) -> tuple[Allocation, int]:
    """Return the allocation that a budget buys, and its bytes.

    Args:
        budget: bytes of the whole pack.
        fixed: parts of the allocation that the user has set; None is not set.
        most_vectors: that a prompt of the backbone can have.
        size_of: bytes of a pack by its allocation.

    Raises:
        UsageError: if the smallest pack does not fit.
    """
    fixed = {name: value for name, value in fixed.items() if value is not None}
    allocation = replace(SMALLEST, **fixed)
    size = size_of(allocation)
    if size + MARGIN > budget:
        raise UsageError(
            f"{budget} bytes are too few: the smallest pack of these classes has {size + MARGIN}",
            hint="raise the budget, or take fewer classes",
        )
    for name, value in LADDER:
        if name in fixed or (name == "vectors" and value > most_vectors):
            continue
        trial = replace(allocation, **{name: value})
        grown = size_of(trial)
        if grown + MARGIN <= budget:
            allocation, size = trial, grown
    return allocation, size


def fixed_by(settings: EncodeSettings) -> dict[str, Any]:
    """Return the parts of an allocation that the user has set, None where not."""
    return {name: getattr(settings, name) for name in ("codec", "candidates", "labels", "probes")}


def table_allocation(
    settings: EncodeSettings, size_of: Callable[[Allocation], int]
) -> tuple[Allocation, tuple[str, ...]]:
    """Return the allocation of a pack whose prompts are rows of a class table, and lines on it."""
    if settings.budget is None:
        allocation = Allocation(
            codec=settings.codec or "f16",
            candidates=settings.candidates or 1,
            share=SHARE,
            labels=settings.labels or "none",
            probes=1 if settings.probes is None else settings.probes,
        )
        return allocation, ()
    fixed = {"modes": 1, "vectors": 1, **fixed_by(settings)}
    allocation, size = spend(settings.budget, fixed, 1, size_of)
    return allocation, (budget_line(allocation, size, settings),)


def budget_line(allocation: Allocation, size: int, settings: EncodeSettings) -> str:
    """Return what a budget was spent on, in one line."""
    seeds = allocation.seeds(settings.images_per_class)
    return (
        f"budget {settings.budget:,} bytes: {allocation.prompts}, {seeds}, "
        f"labels {allocation.labels}, {count(allocation.probes, 'probe')}: about {size:,} bytes"
    )


def expected_bytes(
    classes: tuple[str, ...],
    images_per_class: int,
    recipe: Recipe,
    width: int,
    allocation: Allocation,
    provenance: Mapping[str, Any],
    seed: int,
) -> int:
    """Return the bytes of a pack: one of the same shapes, with random values, is made in memory."""
    rng = np.random.default_rng(0)
    shape = (len(classes), allocation.modes, allocation.vectors, width)
    pack = Pack(
        classes=classes,
        images_per_class=images_per_class,
        recipe=recipe,
        prompts=encode_prompts(rng.standard_normal(shape, np.float32), allocation.codec),
        seed=seed,
        picks=None,
        labels=None,
        probes=None,
        provenance=provenance,
    )
    if allocation.candidates > 1:
        pack = replace(pack, picks=_largest_picks(len(classes), images_per_class, allocation))
    if allocation.probes:
        place = np.arange(allocation.probes)
        images = np.zeros((allocation.probes, 3, PROBE, PROBE), np.uint8)
        numbers = place // len(classes) % images_per_class
        pack = replace(pack, probes=Probes(images, place % len(classes), numbers))
    return len(pack_bytes(pack)) + _label_bytes(len(classes), images_per_class, allocation.labels)


def _largest_picks(classes: int, images: int, allocation: Allocation) -> Any:
    """Picks of which one is as large as any can be."""
    lanes = lanes_of(images, allocation.modes, allocation.share)
    total = candidates_of(images, allocation.modes, allocation.candidates, allocation.share)
    depths = np.arange(images) // lanes
    depths[-1] = total // lanes - 1
    return encode_picks(np.tile(np.arange(images) % lanes + depths * lanes, (classes, 1)), lanes)


def _label_bytes(classes: int, images: int, labels: str) -> int:
    """Bytes of labels, scaled from two classes: a table of a thousand takes too long."""
    kind, k = parse_labels(labels)
    if kind == "none":
        return 0
    probs = np.full((2, images, classes), 1.0 / classes)
    coded = encode_labels(probs, "topk" if kind == "topk" else "dense", **({"k": k} if k else {}))
    return coded.nbytes * classes // 2 + 400  # and its entry in the manifest
