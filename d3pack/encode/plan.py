"""The D3M method's plan: every default made definite, and the size of the pack it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from d3pack.backbones import Backbone
from d3pack.codecs import encode_labels, encode_picks, encode_prompts
from d3pack.encode.options import EncodeOptions, LabelKind, label_kind
from d3pack.encode.seeds import candidates_of, lanes_of
from d3pack.errors import UsageError
from d3pack.format import pack_bytes
from d3pack.pack import Pack, Probes
from d3pack.recipe import BackboneRef, DType, Recipe, Sampler
from d3pack.samplers import schedule
from d3pack.sources import Source
from d3pack.wording import count

SMALL = 64  # pixels; up to this side a collage would leave nothing to see in a patch
TEMPLATES = {1: "a photo of a {}", 2: "a 2x2 collage of {}", 4: "a 4x4 collage of {}"}
PROBE = 8  # side of a stored probe, where the image size allows it
PICKY = 8  # candidates for each image, where making them is cheap ...
SHARE = 8  # ... by so many together: with eight times eight to choose from, six bits say which
UNPICKED = 2.5  # guidance of mini where nobody picks
WORTH_PICKING = 20  # ... and there are so many images a class that the entry of picks is not much


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

    @property
    def seeds(self) -> str:
        """How they are found, in words."""
        if self.candidates == 1:
            return "seeds derived"
        return f"seeds best {self.share} of {self.share * self.candidates}"


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
            f"{dials.prompts}, {dials.seeds}, labels {dials.labels}, "
            f"collages {self.factor}x{self.factor}",
            *self.notes,
        ]


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


def dtype_for(device: str) -> DType:
    """Of the models: only accelerators gain from the narrow one."""
    return "float32" if device.startswith("cpu") else "bfloat16"


def make_recipe(plan: D3MPlan, backbone: Backbone) -> Recipe:
    """How the images of this plan are made."""
    return Recipe(
        backbone=plan.backbone,
        size=plan.size,
        sampler=plan.sampler,
        sigmas=sigmas_of(backbone, plan.sampler, plan.sampler_steps),
        guidance=plan.first_guidance,
        template=plan.template,
        dtype=plan.dtype,
        group=plan.group,
    )


def sigmas_of(backbone: Backbone, sampler: Sampler, steps: int) -> tuple[float, ...]:
    """The noise levels of a backbone that so many steps pass through."""
    return _short(schedule(backbone.levels.alphas_cumprod, sampler, steps))


def _short(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """Seven digits: a hundred times nearer than a level needs to be found, and half the bytes."""
    return tuple(float(f"{sigma:.7g}") for sigma in sigmas)


def expected_bytes(plan: D3MPlan, provenance: Mapping[str, Any], dials: Dials | None = None) -> int:
    """Size of the pack that this plan leads to."""
    sigmas = _short(tuple(np.geomspace(14.6141999, 0.0291672, plan.sampler_steps).tolist()))
    recipe = Recipe(
        plan.backbone,
        plan.size,
        plan.sampler,
        (*sigmas, 0.0),
        plan.first_guidance,
        template=plan.template,
        dtype=plan.dtype,
        group=plan.group,
    )
    dials = dials or plan.dials
    return size_of(
        plan.classes, plan.images_per_class, recipe, plan.width, dials, provenance, plan.seed
    )


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


def with_dials(plan: D3MPlan, dials: Dials, guidance: float | None, note: str) -> D3MPlan:
    """The same plan with other dials, and why; guidance follows them unless it is given."""
    if guidance is None:
        guidance = guidance_for(plan.backbone, dials)
    return replace(plan, dials=dials, guidance=guidance, notes=(*plan.notes, note))
