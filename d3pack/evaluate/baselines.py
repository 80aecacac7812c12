"""What a student can be trained on: the pack, and what it must be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3pack.backbones import MINI_GUIDANCE
from d3pack.evaluate.payload import SMALLEST, Form, Layout, Payload, Squeeze, candidates, largest
from d3pack.evaluate.real import Labelled, RealImages
from d3pack.format.codecs import decode_prompts, encode_prompts
from d3pack.format.pack import Pack

Pilot = Callable[[Labelled, Labelled], float]  # train briefly on the first, accuracy on the second


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What one student is trained on, and what it costs to send."""

    images: Tensor
    labels: Tensor  # int64 (N,) or probabilities (N, C)
    nbytes: int | None  # what travels; None where nobody would send it
    note: str = ""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of a comparison. `identity` decides whether a finished student may be reused."""

    key: str
    title: str
    identity: Mapping[str, Any]
    build: Callable[[int], TrainingSet]  # by seed: random arms draw anew for each student
    detail: Mapping[str, Any] = field(default_factory=dict)
    needs_backbone: bool = False
    hard: bool = False  # train on the classes alone even where the pack has soft labels


def random_images(real: RealImages, per_class: int) -> Arm:
    """Random real images, as many of each class as the pack has, without loss."""

    def build(seed: int) -> TrainingSet:
        drawn = real.draw(per_class, seed)
        return TrainingSet(drawn.images, drawn.labels, None)

    return Arm(
        f"random-{per_class}",
        f"random real images, {per_class} a class",
        {"arm": "random", "per_class": per_class, "real": real.fingerprint()},
        build,
    )


def whole_set(real: RealImages) -> Arm:
    """All real images: the upper bound."""

    def build(seed: int) -> TrainingSet:
        everything = real.all()
        return TrainingSet(everything.images, everything.labels, None)

    return Arm("whole", "the whole real set", {"arm": "whole", "real": real.fingerprint()}, build)


def _split(real: RealImages, limit: int, seed: int) -> list[Tensor]:
    drawn = real.draw(limit, seed)
    return [drawn.images[drawn.labels == c] for c in range(len(real.counts))]


def _labelled(classes: list[Tensor]) -> Labelled:
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(c) for c in classes]))
    return Labelled(torch.cat(classes), labels)


def _limit(real: RealImages, budget: int, layout: Layout) -> int:
    """More images of a class than can fit; what small classes lack, the larger ones may give."""
    left = budget // SMALLEST[layout]
    counts = sorted(real.counts)
    for place, count in enumerate(counts):
        share = left // (len(counts) - place) + 1
        if count >= share:
            return share
        left -= count
    return counts[-1]


HELD = 100  # images of each class on which the trade-off is chosen; never test images


def _held(count: int, found: int) -> int:
    """How many of a class's images only judge: a fifth at most, and never its last one."""
    return min(HELD, max(1, count // 5), found - 1)


def choose_squeeze(
    real: RealImages,
    budget: int,
    form: Form,
    layout: Layout,
    pilot: Pilot,
    report: Callable[[str], None],
) -> tuple[Squeeze | None, dict[str, float]]:
    """The trade-off whose images teach a short-lived student best; None when nothing fits.

    Judged on real training images that the payload does not contain.
    """
    limit = _limit(real, budget, layout)
    drawn = _split(real, limit + HELD, 0)
    held = [_held(real.counts[c], len(images)) for c, images in enumerate(drawn)]
    if not any(held):  # one image a class: there is nothing else to judge on
        judge, classes = _labelled(drawn), drawn
    else:
        judge = _labelled([images[:n] for images, n in zip(drawn, held, strict=True)])
        classes = [images[n : n + limit] for images, n in zip(drawn, held, strict=True)]
    scores: dict[str, float] = {}
    best: tuple[float, Squeeze | None] = (-1.0, None)
    for squeeze in candidates(form, layout, real.size):
        payload = largest(classes, squeeze, budget)
        if payload is None:
            continue
        accuracy = pilot(payload.content, judge)
        scores[str(payload)] = round(accuracy, 4)
        report(f"pilot: {payload}, {100 * accuracy:.1f} %")
        best = max(best, (accuracy, squeeze), key=lambda pair: pair[0])
    return best[1], scores


def _filled(classes: list[Tensor], squeeze: Squeeze, budget: int) -> Payload:
    """The budget's images; one image where this draw is larger than the one of the pilot."""
    found = largest(classes, squeeze, budget)
    if found is None:
        found = largest([images[:1] for images in classes[:1]], squeeze, 1 << 40)
    assert found is not None
    return found


def equal_bytes(real: RealImages, budget: int, squeeze: Squeeze, pilot: dict[str, float]) -> Arm:
    """Random real images that fit into the pack's own bytes."""

    def build(seed: int) -> TrainingSet:
        found = _filled(_split(real, _limit(real, budget, squeeze.layout), seed), squeeze, budget)
        return TrainingSet(found.content.images, found.content.labels, found.nbytes, str(found))

    sheet = squeeze.layout == "sheet"
    form = f"one {squeeze.form} sheet" if sheet else f"{squeeze.form} files"
    return Arm(
        f"{'sheet' if squeeze.form == 'WEBP' and sheet else squeeze.form.lower()}-{budget}",
        f"real images in equal bytes, as {form}",
        {
            "arm": "equal-bytes",
            "budget": budget,
            "squeeze": asdict(squeeze),
            "real": real.fingerprint(),
        },
        build,
        {"pilot": pilot, "squeeze": str(squeeze)},
    )


def collages(
    patches: Callable[[int], list[Tensor]],
    real: RealImages,
    budget: int,
    squeeze: Squeeze,
    teacher: str,
) -> Arm:
    """The patches a teacher finds most real (RDED), in the pack's own bytes.

    `patches(n)` gives up to n of each class, best first; it is asked only when a student is due.
    """

    def build(seed: int) -> TrainingSet:
        found = _filled(patches(_limit(real, budget, squeeze.layout)), squeeze, budget)
        return TrainingSet(found.content.images, found.content.labels, found.nbytes, str(found))

    return Arm(
        f"collages-{budget}",
        "collages chosen by a teacher (RDED) in equal bytes",
        {
            "arm": "collages",
            "budget": budget,
            "squeeze": asdict(squeeze),
            "teacher": teacher,
            "real": real.fingerprint(),
        },
        build,
        {"squeeze": str(squeeze)},
    )


def names_pack(pack: Pack, vectors: Callable[[str, int | None], Tensor], most: int) -> Pack:
    """The same recipe, seed and number of images, prompted by the classes' own names.

    `vectors(name, k)` are the token embeddings of a name, `most` is how many a prompt may have.
    A pack that picks its seeds may do without guidance; names are given what suits derived ones.
    """
    lengths = [len(vectors(name, None)) for name in pack.classes]
    count = min(max(lengths), most)
    prompts = torch.stack([vectors(name, count) for name in pack.classes])
    coded = encode_prompts(prompts[:, None].float().cpu().numpy(), "f16")
    recipe = pack.recipe
    if pack.picks is not None:
        recipe = replace(recipe, guidance=max(recipe.guidance, MINI_GUIDANCE))
    return replace(
        pack,
        recipe=recipe,
        prompts=coded,
        picks=None,
        labels=None,
        adapter=None,
        probes=None,
        provenance={"method": "class names", "from": pack.root},
        optional={},
        extensions={},
    )


def prompted_by_names(pack: Pack, twin: Pack) -> bool:
    """Whether the pack's prompts are what its backbone has for the names: its own class table."""
    own, names = decode_prompts(pack.prompts), decode_prompts(twin.prompts)
    if pack.adapter is not None or own.shape != names.shape:
        return False
    off = float(np.linalg.norm(own - names) / np.linalg.norm(names))
    return bool(off <= pack.prompts.params["error"]["rms"] + 1e-3)  # the twin is rounded too


def pack_arm(
    key: str,
    title: str,
    pack: Pack,
    decode: Callable[[Pack], tuple[Tensor, Tensor]],
    nbytes: int,
    *,
    hard: bool = False,
) -> Arm:
    """A pack as D3MDataset gives it; every seed trains on the same images."""

    def build(seed: int) -> TrainingSet:
        images, labels = decode(pack)
        return TrainingSet(images, labels, nbytes)

    identity = {"arm": "pack", "root": pack.root, "hard": hard}
    return Arm(key, title, identity, build, needs_backbone=True, hard=hard)


def prompt_bytes(pack: Pack) -> int:
    """Bytes of the prompts and of what was learned beside them."""
    sections = pack.ledger().sections
    return sum(sections.get(name, 0) for name in ("prompts", "picks", "adapter"))
