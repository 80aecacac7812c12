"""The D3M method's plan: every default made definite, and the size of the pack it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from d3pack.backbones import Backbone
from d3pack.encode.options import EncodeOptions
from d3pack.encode.plan import (
    PICKY,
    SHARE,
    SMALL,
    Dials,
    dtype_for,
    short,
    sigmas_of,
    size_of,
    typical_side,
)
from d3pack.errors import UsageError
from d3pack.format.recipe import BackboneRef, DType, Recipe, Sampler
from d3pack.sources import Source

TEMPLATES = {1: "a photo of a {}", 2: "a 2x2 collage of {}", 4: "a 4x4 collage of {}"}
UNPICKED = 2.5  # guidance of mini where nobody picks
WORTH_PICKING = 20  # images a class, from which on the entry of picks is not much


@dataclass(frozen=True, slots=True)
class D3MPlan:
    """All settings of one run."""

    classes: tuple[str, ...]
    images: int  # real ones
    images_per_class: int
    typical: int  # shorter side of the source's images
    backbone: BackboneRef
    size: tuple[int, int]
    width: int  # of one vector
    dtype: DType
    dials: Dials
    factor: int
    crops: int
    crop_scale: tuple[float, float]
    template: str
    sampler: Sampler
    sampler_steps: int
    guidance: float | None  # None: by measurement, when the prompts are learned
    group: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def first_guidance(self) -> float:
        """What recipes have until it is measured; written as long as what is measured."""
        return UNPICKED if self.guidance is None else self.guidance

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["notes"]
        value["backbone"] = {"repo": self.backbone.repo, "revision": self.backbone.revision}
        value["classes"] = len(self.classes)
        return value

    def lines(self) -> list[str]:
        dials, name = self.dials, self.backbone.repo or self.backbone.revision[:12]
        guidance = "by measurement" if self.guidance is None else f"{self.guidance:g}"
        return [
            f"{len(self.classes)} classes, {self.images} images; "
            f"{self.images_per_class} to make of each class",
            f"backbone {name}, {self.size[0]}x{self.size[1]}, {self.dtype}; {self.sampler} "
            f"{self.sampler_steps} steps, guidance {guidance}, {self.template!r}",
            f"{dials.prompts}, {dials.seeds(self.images_per_class)}, labels {dials.labels}, "
            f"collages {self.factor}x{self.factor}",
            *self.notes,
        ]


def make_plan(source: Source, options: EncodeOptions, backbone: Backbone) -> D3MPlan:
    """Fill in every default."""
    ref = backbone.ref
    small = ref.repo == "mini"
    picks = options.images_per_class >= WORTH_PICKING
    typical = typical_side(source)
    most, width = backbone.prompt_shape
    size = options.size or backbone.image_size
    backbone.latent_shape_for(size)  # refuses sizes that do not fit
    factor = options.factor or (1 if min(typical, *size) <= SMALL else 2)
    crops = options.crops or (1 if factor == 1 else 5)
    scale = options.crop_scale or ((1.0, 1.0) if factor == 1 else (0.25, 1.0))
    dials = Dials(
        modes=options.modes or 1,
        vectors=options.vectors or 1,
        codec=options.codec or "i4",
        candidates=options.candidates or (PICKY if small and picks else 1),
        share=SHARE,
        labels=options.labels or "none",
        probes=1 if options.probes is None else options.probes,
    )
    if dials.vectors > most:
        raise UsageError(f"this backbone takes at most {most} vectors", hint="lower --vectors")
    if dials.candidates > 2**16 // SHARE:
        raise UsageError(
            f"more than {2**16 // SHARE} candidates an image", hint="lower --candidates"
        )
    notes = []
    if all(name.isdecimal() or name[1:].isdecimal() for name in source.classes):
        notes.append("class names are numbers or ids: --class-names gives inversion a better start")
    return D3MPlan(
        classes=source.classes,
        images=sum(source.counts),
        images_per_class=options.images_per_class,
        typical=typical,
        backbone=ref,
        size=size,
        width=width,
        dtype=dtype_for(backbone.device.type),
        dials=dials,
        factor=factor,
        crops=crops,
        crop_scale=scale,
        template=options.template or TEMPLATES[factor],
        sampler=options.sampler or "dpmpp-2m",
        sampler_steps=options.sampler_steps or (12 if small else 20),
        guidance=guidance_for(ref, dials) if options.guidance is None else options.guidance,
        group=options.group or 16,
        seed=options.seed,
        notes=tuple(notes),
    )


def guidance_for(ref: BackboneRef, dials: Dials) -> float | None:
    """What nobody chose: where images are cheap and a teacher picks, it is measured (None)."""
    if ref.repo == "mini":
        return None if dials.candidates > 1 else UNPICKED
    return 4.0 if ref.kind == "dit" else 5.0


def make_recipe(plan: D3MPlan, backbone: Backbone) -> Recipe:
    """How the images of this plan are made."""
    return _recipe(plan, sigmas_of(backbone, plan.sampler, plan.sampler_steps))


def _recipe(plan: D3MPlan, sigmas: tuple[float, ...]) -> Recipe:
    return Recipe(
        backbone=plan.backbone,
        size=plan.size,
        sampler=plan.sampler,
        sigmas=sigmas,
        guidance=plan.first_guidance,
        template=plan.template,
        dtype=plan.dtype,
        group=plan.group,
    )


def expected_bytes(plan: D3MPlan, provenance: Mapping[str, Any], dials: Dials | None = None) -> int:
    """Size of the pack that this plan leads to."""
    sigmas = short(tuple(np.geomspace(14.6141999, 0.0291672, plan.sampler_steps).tolist()))
    recipe = _recipe(plan, (*sigmas, 0.0))
    dials = dials or plan.dials
    return size_of(
        plan.classes, plan.images_per_class, recipe, plan.width, dials, provenance, plan.seed
    )


def with_dials(plan: D3MPlan, dials: Dials, guidance: float | None, note: str) -> D3MPlan:
    """The same plan with other dials, and why; guidance follows them unless it is given."""
    if guidance is None:
        guidance = guidance_for(plan.backbone, dials)
    return replace(plan, dials=dials, guidance=guidance, notes=(*plan.notes, note))
