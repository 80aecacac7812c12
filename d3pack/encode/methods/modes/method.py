"""MGD3 (arXiv 2505.18963): images pulled towards the centres of clusters of real latents.

Nothing is learned. A class's real images are clustered in the latents of the backbone, an image is
sampled for each cluster with the paper's mode guidance, and what comes out is stored as codes: a
decoder that makes codes makes these images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import TEMPLATE, Backbone, Condition, DiT, default_sampling
from d3pack.encode.allocation import Allocation, expected_bytes, margin_of
from d3pack.encode.candidates import stored
from d3pack.encode.codes import check_can_code, code_seconds
from d3pack.encode.contract import Draft, EncodeContext, EncodeRun, Estimate
from d3pack.encode.estimate import teacher_seconds
from d3pack.encode.finish import sample_provenance
from d3pack.encode.methods.codes.method import images_of, recipe_of_codes
from d3pack.encode.methods.dit import unknown_names_note
from d3pack.encode.methods.modes.clusters import cluster, real_latents
from d3pack.encode.methods.modes.guidance import ModeGuidance
from d3pack.encode.plan import (
    EncodePlan,
    backbone_json,
    chosen_backbone,
    coding_for,
    dtype_for,
    sigmas_of,
)
from d3pack.encode.settings import EncodeSettings, ModesSettings
from d3pack.encode.teaching import open_teacher
from d3pack.encode.vectors import learns_outputs, name_outputs
from d3pack.errors import UsageError
from d3pack.format import Recipe, Sampler
from d3pack.sources import Source, random_order
from d3pack.system import count, seconds_of

STEPS = 50  # of the sampler that makes the images, as in the paper
_FEW = 8  # images that are tried for an estimate


class Modes:
    """Clusters, an image for each of them, codes."""

    name = "modes"
    settings = ModesSettings

    def prepare(
        self, source: Source, settings: EncodeSettings, own: ModesSettings, context: EncodeContext
    ) -> ModesJob:
        """Refuse what images that are made once cannot have."""
        _check(settings)
        backbone = chosen_backbone(settings, context.device)
        coding = replace(coding_for(settings), prompts=False)
        check_can_code(backbone, coding)
        plan = replace(_plan(source, settings, backbone, context), coding=coding)
        job = ModesJob(source, settings, own, backbone, plan)
        if own.pulled > 0 and not job.pulls:
            raise UsageError(
                f"no step pulls: pulled is {own.pulled:g} of"
                f" {count(len(job.sampling().sigmas) - 1, 'step')}, and the last never does",
                hint="raise sampler_steps or pulled, or set pulled to 0",
            )
        job, notes = _within_budget(job)
        text = (*job.text(), *notes)
        return replace(job, plan=replace(job.plan, details=job.details(), text=text))


def _check(settings: EncodeSettings) -> None:
    """Refuse shared settings that say nothing about images that are made once."""
    if settings.select != "teacher":
        raise UsageError("the method modes has no seeds to select")
    if (settings.candidates or 1) > 1:
        raise UsageError("the method modes makes one image of each cluster: no candidates")
    if settings.codec is not None:
        raise UsageError("the method modes stores no vectors: no codec")
    if settings.for_updates != EncodeSettings().for_updates:
        raise UsageError("the method modes has no pilots: leave out for_updates")
    if settings.codes is not None or settings.no_codes:
        raise UsageError(
            "the method modes stores all images as codes, of images that it makes",
            hint="leave out codes and no_codes",
        )
    if settings.sampler not in (None, "lcm"):
        raise UsageError(
            f"invalid sampler {settings.sampler!r}: mode guidance shifts the fresh noise of"
            " ancestral, the default, or lcm"
        )


def _plan(
    source: Source, settings: EncodeSettings, backbone: Backbone, context: EncodeContext
) -> EncodePlan:
    plan = EncodePlan.of(
        source,
        settings,
        size=settings.size or backbone.image_size,
        allocation=Allocation(
            labels=settings.labels or "none",
            probes=1 if settings.probes is None else settings.probes,
        ),
        dtype=dtype_for(context.device),
    )
    return replace(plan, codes=settings.images, made=True)


def _within_budget(job: ModesJob) -> tuple[ModesJob, tuple[str, ...]]:
    """Return the job with as many images as fit, where their number is not set, and a line on it.

    Raises:
        UsageError: if too few fit.
    """
    settings, plan, budget = job.settings, job.plan, job.settings.budget
    if budget is None:
        return job, ()

    def of(images: int) -> ModesJob:
        return replace(job, plan=replace(plan, images_per_class=images, codes=images))

    def size_of(images: int) -> int:
        return of(images).expected_bytes()

    most = plan.images_per_class
    numbers = range(most, most + 1)
    if settings.images_per_class is None:  # more than there are photographs would show them again
        numbers = range(1, min(most, job.largest) + 1)
    fit = bisect_right(numbers, budget - margin_of(settings), key=size_of)
    if not fit:
        least = size_of(numbers[0]) + margin_of(settings)
        raise UsageError(
            f"{budget} bytes are too few: {count(numbers[0], 'image')} of each class take {least}",
            hint="raise the budget, or make fewer images",
        )
    images = numbers[fit - 1]
    size = size_of(images)
    line = f"budget {budget:,} bytes: {count(images, 'image')} of each class: about {size:,} bytes"
    return of(images), (line,)


@dataclass(frozen=True, slots=True)
class ModesJob:
    """Images to be made and coded."""

    source: Source
    settings: EncodeSettings
    own: ModesSettings
    backbone: Backbone
    plan: EncodePlan

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        return self.plan

    def sampling(self) -> Recipe:
        """Return how the images are made, before they are coded."""
        usual, settings, plan = default_sampling(self.backbone), self.settings, self.plan
        made_for = isinstance(getattr(self.backbone, "sampling", None), type(usual))
        steps = settings.sampler_steps or (usual.steps if made_for else STEPS)
        sampler: Sampler = "lcm" if "lcm" in (settings.sampler, usual.sampler) else "ancestral"
        channels = self.backbone.latent_shape_for(plan.size)[0]
        return replace(
            recipe_of_codes(self.backbone, plan),
            sampler=sampler,
            sigmas=sigmas_of(self.backbone, sampler, steps, plan.size),
            guidance=usual.guidance if settings.guidance is None else settings.guidance,
            # as the sampling of DiT's own code
            guided_channels=3 if isinstance(self.backbone, DiT) and channels == 4 else 0,
            extra={"eta": 1.0} if sampler == "ancestral" else {},
        )

    @property
    def pulls(self) -> int:
        """Steps that pull; the last draws no noise that could be shifted."""
        steps = len(self.sampling().sigmas) - 1
        return min(round(steps * self.own.pulled), steps - 1)

    def details(self) -> Mapping[str, Any]:
        """Return what the method adds to a plan."""
        recipe = self.sampling()
        return {
            "backbone": backbone_json(self.backbone.ref),
            "sampler": recipe.sampler,
            "sampler_steps": len(recipe.sigmas) - 1,
            "guidance": recipe.guidance,
        }

    def text(self) -> tuple[str, ...]:
        """Return the same for a person."""
        recipe, plan, ref = self.sampling(), self.plan, self.backbone.ref
        name = ref.repo or ref.revision[:12]
        unknown: tuple[str, ...] = ()
        if isinstance(self.backbone, DiT):
            unknown = unknown_names_note(self.backbone, plan.classes)
        return (
            f"backbone {name}, {plan.size[0]}x{plan.size[1]}, {plan.dtype}; made by"
            f" {recipe.sampler} in {len(recipe.sigmas) - 1} steps, guidance {recipe.guidance:g},"
            f" pull {self.own.pull:g} in the first {self.pulls}",
            f"an image for each of {plan.images_per_class} clusters of a class, labels"
            f" {plan.allocation.labels}",
            *self._few(),
            *unknown,
        )

    def _few(self) -> tuple[str, ...]:
        """Return a line on classes whose clusters must be single photographs."""
        classes, images = self.plan.classes, self.plan.images_per_class
        few = [name for c, name in enumerate(classes) if self._pool(c) <= images]
        if not few:
            return ()
        have = "1 class has" if len(few) == 1 else f"{len(few):,} classes have"
        return (
            f"{have} no more than {count(images, 'photograph')} to cluster, first {few[0]}: each"
            " image may resemble one of them, and clusters take turns where they are fewer",
        )

    def expected_bytes(self) -> int:
        """Return the bytes of the pack."""
        plan = self.plan
        record = sample_provenance(
            Modes.name, self.source, self.settings, (), {}, self._looked, teaches=self._teaches
        )
        recipe = recipe_of_codes(self.backbone, plan)
        return expected_bytes(plan, recipe, 1, plan.allocation, record, weights=self.own.weigh)

    @property
    def largest(self) -> int:
        """Photographs of the largest class that are clustered."""
        return max(map(self._pool, range(len(self.source.classes))))

    @property
    def _looked(self) -> int:
        return sum(map(self._pool, range(len(self.source.classes))))

    def _pool(self, c: int) -> int:
        there = self.source.counts[c]
        return min(there, self.own.pool) if self.own.pool else there

    def estimate(self) -> Estimate:
        """Read, make and code a few images."""
        plan, backbone = self.plan, self.backbone
        coding, classes = plan.coding, len(plan.classes)
        assert coding is not None
        numbers = range(min(_FEW, self.source.counts[0]))
        read = seconds_of(lambda: real_latents(self.source, 0, numbers, plan.size, backbone))
        condition, none = self._conditions(0)
        centres = torch.zeros(plan.group, *backbone.latent_shape_for(plan.size))
        full = self.sampling()
        short = replace(full, sigmas=full.sigmas[-3:])
        made = seconds_of(
            lambda: self._guidance(short).sample(plan.seed, 0, condition, none, centres)
        )
        each = made / plan.group * (len(full.sigmas) - 1) / (len(short.sigmas) - 1)
        code = code_seconds(backbone, plan, recipe_of_codes(backbone, plan), self.settings)
        images = plan.codes * classes
        stages = {
            "clusters": read / len(numbers) * self._looked,
            "images": each * images,
            "codes": code * images,
        }
        if self._teaches and self.settings.teacher == "train":
            device = str(backbone.device)
            stages["teacher"] = teacher_seconds(self.source, plan, self.settings, device)
        return Estimate(self.expected_bytes(), stages)

    @property
    def _teaches(self) -> bool:
        return self.plan.allocation.labels != "none"

    def run(self, run: EncodeRun) -> Draft:
        """Cluster the real images; the rest is done class by class, when it is coded."""
        plan = self.plan
        teacher = open_teacher(run, plan) if self._teaches else None
        mine = [c for c in range(len(plan.classes)) if run.owns(c)]
        with run.events.stage("cluster the images", len(mine), "classes"):
            for done, c in enumerate(mine, 1):
                self._cluster(run, c)
                run.events.step(done)
        entries = [run.journal.load(_name(c)) for c in range(len(plan.classes))]
        known = [entry for entry in entries if entry is not None]
        facts = [figures for _, figures in known]
        counts = [n for arrays, _ in known for n in arrays["counts"].tolist()]
        # a shard knows its own share
        if len(known) == len(entries) and (alone := counts.count(1)):
            run.events.note(
                f"{alone:,} of {len(counts):,} clusters are single photographs, which their images"
                " may resemble"
            )
        return Draft(
            recipe=recipe_of_codes(self.backbone, plan),
            prompts=None,
            backbone=self.backbone,
            teacher=teacher,
            latents=partial(self._images, run),
            weights=partial(self._weights, run) if self.own.weigh else None,
            real=lambda c, most: images_of(run.source, c, plan.size, most).numpy(),
            seen=sum(fact["seen"] for fact in facts),
            bad=sum(fact["bad"] for fact in facts),
        )

    def _cluster(self, run: EncodeRun, c: int) -> None:
        """Keep the clusters of a class in the journal."""
        if run.journal.has(_name(c)):
            return
        plan, pool = self.plan, self._pool(c)
        numbers = random_order(run.source.counts[c], plan.seed, c)[:pool]
        latents = real_latents(run.source, c, numbers, plan.size, self.backbone)
        clusters = cluster(latents, plan.codes, plan.seed)
        run.remember_skipped()
        run.journal.save(
            _name(c),
            {"centres": clusters.centres.numpy(), "counts": np.asarray(clusters.counts)},
            {"seen": len(latents), "bad": pool - len(latents)},
        )

    def _images(self, run: EncodeRun, c: int) -> Tensor:
        """Return latents of the images of a class; clusters take turns where there are fewer."""
        centres = torch.from_numpy(stored(run.journal, _name(c))[0]["centres"])
        condition, none = self._conditions(c)
        wanted = centres[torch.arange(self.plan.codes) % len(centres)]
        made = self._guidance(self.sampling()).sample(self.plan.seed, c, condition, none, wanted)
        return made.to(self.backbone.device)

    def _weights(self, run: EncodeRun, c: int) -> npt.NDArray[np.float64]:
        """Return the shares of the images of a class, whose mean is 1.

        Images of one cluster divide its share.
        """
        counts = stored(run.journal, _name(c))[0]["counts"]
        cluster_of = np.arange(self.plan.codes) % len(counts)
        shares = (counts / np.bincount(cluster_of))[cluster_of]
        weights: npt.NDArray[np.float64] = shares / shares.mean()
        return weights

    def _guidance(self, recipe: Recipe) -> ModeGuidance:
        return ModeGuidance(self.backbone, recipe, self.own.pull, self.pulls)

    @torch.no_grad()
    def _conditions(self, c: int) -> tuple[Condition, Condition | None]:
        """Return the condition of a class, by its name, and that of none where guidance asks."""
        backbone, name = self.backbone, self.plan.classes[c]
        guided = self.sampling().guidance != 1.0
        if learns_outputs(backbone, None):
            vectors = name_outputs(backbone, name, TEMPLATE)
            if not guided:
                return backbone.condition(vectors[None], None), None
            without = backbone.outputs("", len(vectors))
            return backbone.condition(vectors[None], None), backbone.condition(without[None], None)
        vectors = backbone.name_vectors(name)
        none = backbone.unconditional() if guided else None
        return backbone.condition(vectors[None], TEMPLATE), none


def _name(c: int) -> str:
    """Where the journal keeps the clusters of a class."""
    return f"modes/{c:06d}"
