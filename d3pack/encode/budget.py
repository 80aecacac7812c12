"""A budget in bytes: which dials to turn, in the order in which bytes buy most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from d3pack.encode.options import EncodeOptions
from d3pack.encode.plan import PICKY, SHARE, Dials
from d3pack.errors import UsageError
from d3pack.system.text import count

MARGIN = 200  # bytes: measured figures in the manifest have more or fewer digits
BARE = Dials(modes=1, vectors=1, codec="i4", candidates=1, labels="none", probes=0)

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
    budget: int, options: EncodeOptions, most_vectors: int, size_of: Callable[[Dials], int]
) -> tuple[Dials, int]:
    """Dials that fit the budget, and the bytes they come to; dials set by hand stay as they are."""
    fixed = {
        name: getattr(options, name)
        for name in ("modes", "vectors", "codec", "candidates", "labels", "probes")
        if getattr(options, name) is not None
    }
    dials = replace(BARE, **fixed)
    size = size_of(dials)
    if size + MARGIN > budget:
        raise UsageError(
            f"{budget} bytes are too few: the smallest pack of these classes has {size + MARGIN}",
            hint="raise --budget, or take fewer classes",
        )
    for name, value in LADDER:
        if name in fixed or (name == "vectors" and value > most_vectors):
            continue
        trial = replace(dials, **{name: value})
        grown = size_of(trial)
        if grown + MARGIN <= budget:
            dials, size = trial, grown
    return dials, size


def table_dials(
    options: EncodeOptions, size_of: Callable[[Dials], int]
) -> tuple[Dials, tuple[str, ...]]:
    """Dials of a method whose prompts are rows of a class table, and what a person may know."""
    if (options.modes or 1) > 1 or (options.vectors or 1) > 1:
        raise UsageError("a class table has one vector a class", hint="leave --modes out")
    if options.budget is None:
        dials = Dials(
            codec=options.codec or "f16",
            candidates=options.candidates or 1,
            share=SHARE,
            labels=options.labels or "none",
            probes=1 if options.probes is None else options.probes,
        )
        return dials, ()
    dials, size = spend(options.budget, replace(options, modes=1, vectors=1), 1, size_of)
    return dials, (describe(dials, size, options),)


def describe(dials: Dials, size: int, options: EncodeOptions) -> str:
    """What was chosen, in one line."""
    seeds = dials.seeds(options.images_per_class)
    return (
        f"budget {options.budget:,} bytes: {dials.prompts}, {seeds}, labels {dials.labels}, "
        f"{count(dials.probes, 'probe')}: about {size:,} bytes"
    )
