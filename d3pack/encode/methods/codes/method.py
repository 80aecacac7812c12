"""The method `codes`: every image of the source as a code, and nothing learned.

What another method has distilled or chosen travels exactly as it is, as closely as the bytes allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from PIL import Image, ImageOps
from torch import Tensor

from d3pack.backbones import TEMPLATE, Backbone
from d3pack.encode.allocation import Allocation, expected_bytes, margin_of
from d3pack.encode.codes import check_can_code, code_seconds
from d3pack.encode.contract import Draft, EncodeContext, EncodeRun, Estimate, NoSettings
from d3pack.encode.finish import sample_provenance
from d3pack.encode.plan import (
    EncodePlan,
    chosen_backbone,
    coding_for,
    dtype_for,
)
from d3pack.encode.real import pixels_of, readable_images
from d3pack.encode.settings import EncodeSettings
from d3pack.encode.vectors import learns_outputs
from d3pack.errors import UsageError
from d3pack.format import Recipe
from d3pack.sources import Source


class CodesOnly:
    """Codes of all images, in the order of the source."""

    name = "codes"
    settings = NoSettings

    def prepare(
        self, source: Source, settings: EncodeSettings, own: NoSettings, context: EncodeContext
    ) -> CodesJob:
        """Refuse what only methods with a teacher can do."""
        backbone = chosen_backbone(settings, context.device)
        if settings.no_codes:
            raise UsageError("the method codes makes nothing but codes: leave out no_codes")
        if settings.select != "teacher":
            raise UsageError("the method codes has no seeds to select")
        if (settings.candidates or 1) > 1 or settings.labels not in (None, "none"):
            raise UsageError("the method codes has no teacher to pick or label images")
        if settings.images_per_class is not None or settings.codes is not None:
            raise UsageError(
                "the method codes takes all images of the source",
                hint="leave out the number of images, or give it a source of fewer",
            )
        count = max(source.counts)
        settings = replace(settings, images_per_class=count, codes=count)
        plan = EncodePlan.of(
            source,
            settings,
            size=settings.size or backbone.image_size,
            allocation=Allocation(probes=1 if settings.probes is None else settings.probes),
            dtype=dtype_for(context.device),
        )
        coding = replace(coding_for(settings), prompts=False)
        check_can_code(backbone, coding)
        plan = replace(plan, coding=coding)
        job = CodesJob(source, settings, backbone, plan)
        least, budget = job.expected_bytes() + margin_of(settings), settings.budget
        if budget is not None and least > budget:
            raise UsageError(
                f"{budget} bytes are too few: the codes of all images take {least}",
                hint="raise the budget, or take fewer bytes for each image",
            )
        return job


def recipe_of_codes(backbone: Backbone, plan: EncodePlan) -> Recipe:
    """Return a recipe whose sampler makes no image, since all have codes."""
    return Recipe(
        backbone=backbone.ref,
        size=plan.size,
        sampler="euler",
        sigmas=(1.0, 0.0),
        template=None if learns_outputs(backbone, None) else TEMPLATE,
        dtype=plan.dtype,
        group=plan.group,
    )


@dataclass(frozen=True, slots=True)
class CodesJob:
    """Images to be coded."""

    source: Source
    settings: EncodeSettings
    backbone: Backbone
    plan: EncodePlan

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        return self.plan

    def recipe(self) -> Recipe:
        """Return how the images are decoded."""
        return recipe_of_codes(self.backbone, self.plan)

    def expected_bytes(self) -> int:
        """Return the bytes of the pack."""
        plan = self.plan
        record = sample_provenance(CodesOnly.name, self.source, self.settings, (), {})
        return expected_bytes(plan, self.recipe(), 1, plan.allocation, record)

    def estimate(self) -> Estimate:
        """Code a few images."""
        plan = self.plan
        assert plan.coding is not None
        seconds = code_seconds(self.backbone, plan, self.recipe(), self.settings)
        return Estimate(self.expected_bytes(), {"codes": seconds * plan.codes * len(plan.classes)})

    def run(self, run: EncodeRun) -> Draft:
        """Return an empty draft; the driver codes the images."""
        return Draft(
            recipe=self.recipe(),
            prompts=None,
            backbone=self.backbone,
            photographs=partial(self._photographs, run.source),
            real=lambda c, most: self._photographs(run.source, c, most).numpy(),
            seen=sum(run.source.counts),
        )

    def _photographs(self, source: Source, c: int, most: int | None = None) -> Tensor:
        count = self.plan.codes if most is None else min(most, self.plan.codes)
        return images_of(source, c, self.plan.size, count)


def images_of(source: Source, c: int, size: tuple[int, int], count: int) -> Tensor:
    """Return `count` images of a class in the order of the source, of which it may repeat some.

    Of an image of another aspect the middle is taken, as everywhere.
    """
    height, width = size
    images = islice(readable_images(source, c, range(source.counts[c])), count)
    pixels = [
        pixels_of(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
        for image in images
    ]
    return torch.stack([pixels[i % len(pixels)] for i in range(count)])
