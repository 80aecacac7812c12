"""What the bytes of a pack are spent on: how a budget is spent, and how large a pack will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from d3pack.encode.candidates import candidates_of, lanes_of
from d3pack.encode.settings import EncodeSettings, parse_labels
from d3pack.errors import UsageError
from d3pack.format import (
    Coded,
    Codes,
    Pack,
    Probes,
    Recipe,
    encode_codes,
    encode_labels,
    encode_picks,
    encode_prompts,
    encode_sets,
    encode_unconditional,
    encode_weights,
    pack_bytes,
)
from d3pack.system import count

if TYPE_CHECKING:
    from d3pack.encode.plan import EncodePlan

PROBE = 8  # side of a stored probe, where the size of the images allows it
PICKY = 8  # candidates for each image where making them is cheap ...
SHARE = 8  # ... shared by so many images: of eight times eight, six bits say which
SETS = {"s3": 5, "draws": 4096}  # sets of a class where nothing is said; five as in IMS3
MARGIN = 200  # bytes: measured figures in the manifest have more or fewer digits
LEAN_MARGIN = 64  # where provenance has few of them


def margin_of(settings: EncodeSettings) -> int:
    """Return the bytes of a budget that are left free for what is only known at last."""
    return LEAN_MARGIN if settings.provenance == "lean" else MARGIN


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the bytes of a pack are spent on."""

    modes: int = 1
    vectors: int = 1
    codec: str = "i4"
    candidates: int = 1  # for each image; 1: derived seeds
    select: str = "teacher"  # how candidates are picked; s3 and draws pick sets
    share: int = 1  # images that choose among the candidates of all of them, for more bits each
    labels: str = "none"
    probes: int = 1

    @property
    def judged(self) -> int:
        """Images that are made for each one that is kept, to choose it."""
        return 0 if self.candidates == 1 or self.select == "draws" else self.candidates

    @property
    def prompts(self) -> str:
        """What is stored of a class, in words."""
        return f"{count(self.modes, 'mode')} of {count(self.vectors, 'vector')} as {self.codec}"

    def seeds(self, images_per_class: int) -> str:
        """How seeds are chosen, in words."""
        if not images_per_class:
            return "no seeds"
        if self.candidates == 1:
            return "seeds derived"
        if self.select != "teacher":
            return f"seeds of the best of {self.candidates:,} sets by {self.select}"
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
SEEDS_LADDER = LADDER[:4]  # seeds and probes: codes bring more than the rest


def allocate(
    settings: EncodeSettings,
    size_of: Callable[[Allocation], int],
    *,
    default: Allocation,
    own: Mapping[str, int | None],
    least_vectors: int = 1,
    most_vectors: int = 1,
    ladder: Sequence[tuple[str, Any]] = LADDER,
    prompts: bool = True,
) -> tuple[Allocation, tuple[str, ...]]:
    """Return the allocation of a pack, and a line on how a budget was spent.

    Args:
        settings: what the user has set stays as it is.
        size_of: bytes of the pack by its allocation.
        default: where there is no budget.
        own: parts that the method's own settings set; None is not set.
        least_vectors: that a prompt of the backbone must have.
        most_vectors: that it can have.
        ladder: what a budget buys, in this order.
        prompts: whether the pack has any.

    Raises:
        UsageError: if the smallest pack exceeds the budget.
    """
    shared = {name: getattr(settings, name) for name in ("codec", "candidates", "labels", "probes")}
    fixed = {name: value for name, value in {**own, **shared}.items() if value is not None}
    if settings.select != "teacher":
        sets = {"candidates": settings.candidates or SETS[settings.select], "share": 1}
        fixed |= {**sets, "select": settings.select}
    if settings.budget is None:
        return replace(default, **{"vectors": least_vectors, **fixed}), ()
    if not prompts:
        ladder = [rung for rung in ladder if rung[0] in ("probes", "labels")]
    allocation, size = spend(
        settings.budget,
        fixed,
        most_vectors,
        size_of,
        ladder,
        least_vectors=least_vectors,
        margin=margin_of(settings),
    )
    seeds = allocation.seeds(settings.images - (settings.codes or 0))
    vectors = f"{allocation.prompts}, {seeds}" if prompts else "no prompts"
    line = (
        f"budget {settings.budget:,} bytes: {vectors}, "
        f"labels {allocation.labels}, {count(allocation.probes, 'probe')}: about {size:,} bytes"
    )
    return allocation, (line,)


def spend(
    budget: int,
    fixed: Mapping[str, Any],
    most_vectors: int,
    size_of: Callable[[Allocation], int],
    ladder: Sequence[tuple[str, Any]] = LADDER,
    *,
    least_vectors: int = 1,
    margin: int = MARGIN,
) -> tuple[Allocation, int]:
    """Return the allocation that a budget buys, with its fixed parts, and its bytes."""
    allocation = replace(SMALLEST, **{"vectors": least_vectors, **fixed})
    size = size_of(allocation)
    if size + margin > budget:
        raise UsageError(
            f"{budget} bytes are too few: the smallest pack of these classes has {size + margin}",
            hint="raise the budget, or take fewer classes",
        )
    for name, value in ladder:
        if name in fixed or (name == "vectors" and not allocation.vectors < value <= most_vectors):
            continue
        trial = replace(allocation, **{name: value})
        grown = size_of(trial)
        if grown + margin <= budget:
            allocation, size = trial, grown
    return allocation, size


def expected_bytes(
    plan: EncodePlan,
    recipe: Recipe,
    width: int,
    allocation: Allocation,
    provenance: Mapping[str, Any],
    *,
    unconditional: bool = False,
    adapter: Coded | None = None,
    weights: bool = False,
) -> int:
    """Return the bytes of a pack: one of the same shapes, with random values, is made in memory.

    Args:
        plan: classes, images and seed.
        recipe: as long as the real one.
        width: of a vector.
        allocation: in place of the plan's.
        provenance: as long as the real one.
        unconditional: the pack has vectors of no class.
        adapter: of the pack.
        weights: images have weights.
    """
    classes, images = len(plan.classes), plan.images_per_class
    recipe = plan.recipe_of(recipe)
    unconditional = unconditional and recipe.guidance != 1.0
    shape = (classes, allocation.modes, allocation.vectors, width)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    if not plan.needs_prompts:
        provenance = {**provenance, "coding": {}}
    pack = Pack(
        classes=plan.classes,
        images_per_class=images,
        recipe=recipe,
        prompts=encode_prompts(values, allocation.codec) if plan.needs_prompts else None,
        seed=plan.seed,
        unconditional=encode_unconditional(values[0, 0]) if unconditional else None,
        adapter=adapter,
        weights=encode_weights(np.full((classes, images), 2.0)) if weights else None,
        provenance=provenance,
    )
    if allocation.candidates > 1 and plan.seeded:
        pack = replace(pack, picks=_largest_picks(classes, plan.seeded, allocation))
    if plan.coding is not None:
        atoms = np.concatenate([np.arange(m) for m in plan.coding.atoms])
        codes = np.tile(atoms, (classes, plan.codes, 1))
        signs = np.ones_like(codes, dtype=np.int8)
        pack = replace(pack, codes=encode_codes(Codes(plan.coding, plan.codes, codes, signs)))
    if allocation.probes:
        place = np.arange(allocation.probes)
        pixels = np.zeros((allocation.probes, 3, PROBE, PROBE), np.uint8)
        pack = replace(pack, probes=Probes(pixels, place % classes, place // classes % images))
    return len(pack_bytes(pack)) + _label_bytes(classes, images, allocation.labels)


def _largest_picks(classes: int, images: int, allocation: Allocation) -> Any:
    """Picks of which one is as large as any can be."""
    if allocation.select != "teacher":
        stride = -(-images // allocation.modes) * allocation.modes
        return encode_sets(np.full(classes, allocation.candidates - 1), images, stride)
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
    return coded.nbytes * classes // 2 + 100  # and its entry in the manifest
