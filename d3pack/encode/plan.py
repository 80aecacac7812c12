"""The plan of a job: the value of every setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from d3pack.backbones import Backbone, default_backbone, levels_of, open_backbone
from d3pack.decode import schedule
from d3pack.encode.allocation import Allocation
from d3pack.encode.settings import EncodeSettings
from d3pack.format import BackboneRef, Coding, DType, Recipe, Sampler, level_bits
from d3pack.sources import Source
from d3pack.system import SettingError

_FIRST = 4  # images of a class that are looked at
_TINT = 3  # by which channels of a grey image differ, at most: JPEG rounds
_SAMPLING = {"eta", "table"}  # of the extra of a recipe
SMALL = 64  # pixels; patches of collages of images up to this side would show nothing
GROUP = 16  # images of one forward pass
CODE_STEPS = 15  # noise levels of a code
CODE_LEVELS = (7.0, 0.5)  # first and last, for latents of about unit variance
LEAST = 3  # bytes of a code
_BITS = (8, 10, 12)  # of codebooks


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """The resolved settings of a job."""

    classes: tuple[str, ...]
    images: int  # real ones
    images_per_class: int
    typical: int  # shorter side of the real images
    size: tuple[int, int]  # of the images of the pack
    dtype: DType  # of the models that make them
    allocation: Allocation
    group: int
    seed: int
    codes: int = 0  # images of each class that are coded: photographs, unless they are made
    coding: Coding | None = None
    pilots: int = 0  # updates of the students that choose codes and seeds; 0: nothing to choose
    details: Mapping[str, Any] = field(default_factory=dict)  # what the method adds, as JSON
    text: tuple[str, ...] = ()  # the same for a person
    made: bool = False  # whether what is coded are images that the method makes
    grey: bool = False  # whether images get no colours
    repeated: tuple[str, ...] = ()  # a line on classes that repeat photographs

    @classmethod
    def of(
        cls,
        source: Source,
        settings: EncodeSettings,
        *,
        size: tuple[int, int],
        allocation: Allocation,
        dtype: DType = "float32",
        typical: int | None = None,
        pilots: int = 0,
        details: Mapping[str, Any] | None = None,
        text: tuple[str, ...] = (),
    ) -> EncodePlan:
        """Return a plan of a source, with what methods have in common filled in."""
        return cls(
            classes=source.classes,
            images=sum(source.counts),
            images_per_class=settings.images,
            typical=typical_side(source) if typical is None else typical,
            size=size,
            dtype=dtype,
            allocation=allocation,
            group=settings.group or GROUP,
            seed=settings.seed,
            codes=settings.codes or 0,
            coding=coding_for(settings) if settings.codes else None,
            pilots=pilots,
            details=details or {},
            text=text,
            repeated=repeats(source.classes, source.counts, settings.codes or 0),
            grey=not settings.colours and is_grey(source),
        )

    @property
    def seeded(self) -> int:
        """Images of each class that are made of seeds."""
        return self.images_per_class - self.codes

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """Return a recipe as the images need it.

        Where photographs have no colours, images get none. Where all are made of codes, which have
        noise levels of their own, its sampler makes none: one that takes few bytes stands in its
        place. They may be smaller than images of seeds.
        """
        if self.grey:
            recipe = replace(recipe, grey=True)
        if self.seeded:
            return recipe
        extra = {name: value for name, value in recipe.extra.items() if name not in _SAMPLING}
        return replace(
            recipe,
            size=self.size,
            sampler="euler",
            sigmas=(1.0, 0.0),
            guidance=1.0,
            extra=extra,
        )

    @property
    def needs_prompts(self) -> bool:
        """Whether any image is made under a prompt."""
        return self.coding is None or self.coding.prompts or self.seeded > 0

    @property
    def makes_images(self) -> bool:
        """Whether seeds are chosen, or photographs coded, when the method has learned."""
        picks = self.allocation.candidates > 1 and self.seeded > 0
        return picks or self.asks_teacher

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher picks or labels images, or chooses photographs."""
        judges = self.allocation.judged > 0 and self.seeded > 0
        return bool(judges or self.codes or self.pilots or self.allocation.labels != "none")

    def to_json(self) -> dict[str, Any]:
        """Return what a run must have in common with the one that it continues."""
        value = asdict(self)
        del value["text"], value["details"], value["made"], value["repeated"]
        return {**value, "classes": len(self.classes), **self.details}

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        first = (
            f"{len(self.classes)} classes, {self.images} images; "
            f"{self.images_per_class} to make of each class"
        )
        lines = [first, *self.text]
        if self.grey:
            lines.append("grey images, as the photographs are; --colours keeps what is made")
        if self.coding is not None and self.made:
            lines.append(f"images as codes of {self.coding.nbytes:.1f} bytes")
        elif self.coding is not None:
            lines.append(
                f"{self.codes} of each class are photographs as codes of {self.coding.nbytes:.1f}"
                " bytes: their likeness can be rebuilt"
            )
            lines += self.repeated
        if self.pilots:
            lines.append(
                "seeds, photographs as codes (their likeness can be rebuilt), or both:"
                f" pilots of {self.pilots:,} updates choose"
            )
        return lines


def repeats(classes: Sequence[str], counts: Sequence[int], codes: int) -> tuple[str, ...]:
    """Return a line on classes that must repeat photographs: codes are as many in each class."""
    few = [name for name, n in zip(classes, counts, strict=True) if n < codes]
    if not few:
        return ()
    have = "1 class has" if len(few) == 1 else f"{len(few)} classes have"
    repeat = "repeats" if len(few) == 1 else "repeat"
    return (f"{have} fewer than {codes} photographs to code and {repeat} them, first {few[0]}",)


def typical_side(source: Source) -> int:
    """Return the median shorter side of the first readable image of up to 16 classes."""
    sides = [min(image.size) for image in _looked(source, 1)]
    return int(np.median(sides)) if sides else SMALL


def is_grey(source: Source) -> bool:
    """Return whether the first readable images of up to 16 classes have no colours."""
    seen = False
    for image in _looked(source, _FIRST):
        if np.ptp(np.asarray(image.convert("RGB"), np.int16), axis=2).max() > _TINT:
            return False
        seen = True
    return seen


def _looked(source: Source, most: int) -> Iterator[Image]:
    """Yield at most so many of the first images of up to 16 classes, those that can be read."""
    for c in np.linspace(0, len(source.classes) - 1, min(16, len(source.classes))).astype(int):
        images = (source.get(int(c), i) for i in range(min(_FIRST, source.counts[c])))
        yield from islice((image for image in images if image is not None), most)


def chosen_backbone(settings: EncodeSettings, device: str) -> Backbone:
    """Open the backbone that the settings name, or the default one of a device."""
    return open_backbone(
        settings.backbone or default_backbone(device),
        device=device,
        dtype=getattr(torch, dtype_for(device)),
    )


def dtype_for(device: str) -> DType:
    """Return the dtype of the models: bfloat16 is faster on accelerators alone."""
    return "float32" if device.startswith("cpu") else "bfloat16"


def coding_for(settings: EncodeSettings) -> Coding:
    """Return how photographs are coded: levels evenly spaced in log sigma, equally many atoms."""
    sigmas = np.geomspace(*CODE_LEVELS, settings.code_steps)
    return Coding(
        sigmas=(*(float(f"{sigma:.4g}") for sigma in sigmas), 0.0),
        atoms=(settings.code_atoms,) * settings.code_steps,
        bits=settings.code_bits,
    )


def coding_within(nbytes: float) -> tuple[int, int, int]:
    """Return levels, bits and atoms of codes of at most so many bytes.

    Of codebooks and numbers of atoms that fit into fifteen levels, those are taken that come
    nearest to random latents; for fewer bytes than the smallest takes, there are fewer levels, down
    to the two that take 3 bytes. Codebooks of 14 bits take ten times as long, so they are taken
    only for the bytes between those of 12 bits and those of two atoms.

    Raises:
        SettingError: no code takes so many bytes.
    """
    most = _nbytes(_BITS[-1], _most_atoms(_BITS[-1]))
    if not LEAST <= nbytes <= most:
        raise SettingError("bytes_per_image", nbytes, f"a number from {LEAST} to {int(most)}")
    fits = [
        (nearness(bits, atoms), bits, atoms)
        for bits in _BITS
        for atoms in range(1, _most_atoms(bits) + 1)
        if _nbytes(bits, atoms) <= nbytes
    ]
    if fits and max(fits)[2] == 1 and _nbytes(14, 1) <= nbytes:
        return CODE_STEPS, 14, 1
    if fits:
        _, bits, atoms = max(fits)
        return CODE_STEPS, bits, atoms
    return max(2, int(nbytes * 8 // level_bits(256, 1))), 8, 1


def nearness(bits: int, atoms: int) -> float:
    """Return how near the best atoms of a codebook come to noise: the share of its length, scaled.

    An entry's product with noise is a normal number, so the best are the largest of 2**bits; atoms
    of equal weight are divided by the root of their number.
    """
    normal, entries = NormalDist(), 1 << bits
    best = sum(normal.inv_cdf(1 - (i + 0.5) / (2 * entries)) for i in range(atoms))
    return best / math.sqrt(atoms)


def _nbytes(bits: int, atoms: int) -> float:
    return CODE_STEPS * level_bits(1 << bits, atoms) / 8


def _most_atoms(bits: int) -> int:
    return (1 << bits) // 8  # a larger codebook brings more than more of them


def sigmas_of(
    backbone: Backbone, sampler: Sampler, steps: int, size: tuple[int, int]
) -> tuple[float, ...]:
    """Return the noise levels of a backbone that so many steps pass through, for a size."""
    levels = levels_of(backbone, size, steps)
    return rounded(schedule(levels.alphas_cumprod, sampler, steps))


def rounded(sigmas: tuple[float, ...], digits: int = 6) -> tuple[float, ...]:
    """Return levels in so few digits: six are enough to find them again, and half of the bytes."""
    return tuple(float(f"{sigma:.{digits}g}") for sigma in sigmas)


def backbone_json(ref: BackboneRef) -> dict[str, str]:
    """Return a backbone as plans name it."""
    return {"repo": ref.repo, "revision": ref.revision}
