"""Minimax diffusion (arXiv 2311.15529): a DiT fine-tuned to be representative and diverse.

Losses, memories, what learns (`difffit.py`) and all defaults are those of the authors' code:
AdamW at 1e-3 without decay, batches of 8, 8 passes, averages of 0.9999 that start at the backbone
(of which 12,000 steps, as theirs, leave 30 % in the average), a tenth of the labels
dropped, 64 latents a class and memory, weights 0.002 and 0.008, guidance 4. Ours, where it is
silent or does not carry over: latents are the autoencoder's means, not samples; the backbone's own
autoencoder decodes (theirs: sd-vae-ft-mse); a class unknown to the backbone starts at the mean of
the known rows, and the plan names it (theirs has the true number); the sampler is one of the
format's (theirs is 50 steps of DDPM with one seed for all images, so that image i depends on those
before it); seeds, labels and probes are D3M's. What was learned is the pack's adapter, the class
rows its prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from d3pack.backbones import DiT, Sampling, open_backbone
from d3pack.encode.allocation import SMALLEST, Allocation, expected_bytes, margin_of
from d3pack.encode.candidates import stored
from d3pack.encode.codes import code_seconds
from d3pack.encode.contract import Draft, EncodeContext, EncodeRun, Estimate
from d3pack.encode.estimate import teacher_seconds
from d3pack.encode.finish import sample_provenance
from d3pack.encode.methods.dit import (
    IMAGES,
    allocate_rows,
    encode_images,
    spread_images,
    unknown_names_note,
)
from d3pack.encode.methods.minimax.difffit import fitted
from d3pack.encode.methods.minimax.finetune import FineTuning, Tuned, full_adapter, tuning_seconds
from d3pack.encode.plan import EncodePlan, backbone_json, dtype_for, sigmas_of
from d3pack.encode.sampler_fit import can_fit
from d3pack.encode.sampler_search import best_sampling, fitting, grid, searched
from d3pack.encode.sets import draw_seconds
from d3pack.encode.settings import EncodeSettings, MinimaxSettings
from d3pack.encode.teaching import open_teacher
from d3pack.errors import UsageError
from d3pack.format import Recipe, encode_adapter
from d3pack.sources import Source
from d3pack.system import Checkpoint, seconds_of

# in the journal
_TUNED, _PROMPTS = "tuning/tuned", "prompts"


class Minimax:
    """Teacher, fine-tuning."""

    name = "minimax"
    settings = MinimaxSettings

    def prepare(
        self, source: Source, settings: EncodeSettings, own: MinimaxSettings, context: EncodeContext
    ) -> MinimaxJob:
        """Settle every setting; the backbone must be a DiT."""
        if not settings.backbone:
            raise UsageError(
                "minimax tunes a class-conditional DiT: expected a backbone",
                hint="for instance facebook/DiT-XL-2-256, or one that classcond has trained",
            )
        backbone = open_backbone(settings.backbone, device=context.device, dtype=torch.float32)
        if not isinstance(backbone, DiT):
            raise UsageError(
                f"minimax tunes a class-conditional DiT, and this is a {backbone.ref.kind}",
                hint="the method d3m takes it",
            )
        size = settings.size or backbone.image_size
        channels = backbone.latent_shape_for(size)[0]
        plan = EncodePlan.of(
            source, settings, size=size, dtype=dtype_for(context.device), allocation=SMALLEST
        )
        sampling = Sampling(
            settings.sampler or "dpmpp-2m",
            settings.sampler_steps or 20,
            4.0 if settings.guidance is None else settings.guidance,
        )
        guided_channels = 3 if channels == 4 else 0  # as the sampling of DiT's own code

        def job_with(codec: str) -> MinimaxJob:
            nbytes = adapter_bytes(backbone, plan.classes, codec)
            return MinimaxJob(
                source, settings, own, backbone, plan, sampling, guided_channels, codec, nbytes
            )

        job = job_with(own.adapter or "f16")
        budget = settings.budget if own.adapter is None else None
        if budget is not None and job.expected_bytes(SMALLEST) + margin_of(settings) > budget:
            job = job_with("i8")
        allocation, notes = allocate_rows(settings, job.expected_bytes)
        details, text = job.details(), (*job.text(allocation), *notes)
        return replace(job, plan=replace(plan, allocation=allocation, details=details, text=text))


@dataclass(frozen=True, slots=True)
class MinimaxJob:
    """A DiT to be fine-tuned on the source."""

    source: Source
    settings: EncodeSettings
    own: MinimaxSettings
    backbone: DiT  # in float32
    plan: EncodePlan
    sampling: Sampling
    guided_channels: int
    adapter: str  # its codec
    adapter_bytes: int  # of everything that may move

    @property
    def steps(self) -> int:
        """Of the fine-tuning; a pass leaves out what does not fill a batch, as in the paper's."""
        passes = max(1, self.plan.images // self.own.batch) * self.own.epochs
        return self.own.train_steps or passes

    def _teaches(self, plan: EncodePlan) -> bool:
        """Return whether images are judged or labelled, or photographs chosen for codes."""
        return plan.asks_teacher or self.own.search_images > 0

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        return self.plan

    def details(self) -> dict[str, Any]:
        """Return what minimax adds to a plan."""
        return {
            "backbone": backbone_json(self.backbone.ref),
            "sampler": self.sampling.sampler,
            "sampler_steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "guided_channels": self.guided_channels,
            "settings": {**asdict(self.own), "adapter": self.adapter},
        }

    def text(self, allocation: Allocation) -> tuple[str, ...]:
        """Return the same for a person."""
        plan, ref, sampling = self.plan, self.backbone.ref, self.sampling
        start = self.own.ema**self.steps
        return (
            f"backbone {ref.repo or ref.revision[:12]}, {plan.size[0]}x{plan.size[1]}, "
            f"{plan.dtype}; {sampling}",
            f"{self.steps} steps of {self.own.batch}, whose average keeps {100 * start:.0f} % of "
            f"the backbone; adapter as {self.adapter}, "
            f"class vectors as {allocation.codec}, {allocation.seeds(plan.seeded)}, "
            f"labels {allocation.labels}",
            *unknown_names_note(self.backbone, plan.classes),
        )

    def recipe(self, backbone: DiT) -> Recipe:
        """Return how the images are made."""
        return Recipe(
            backbone=self.backbone.ref,
            size=self.plan.size,
            sampler=self.sampling.sampler,
            sigmas=sigmas_of(backbone, self.sampling.sampler, self.sampling.steps, self.plan.size),
            guidance=self.sampling.guidance,
            guided_channels=self.guided_channels,
            dtype=self.plan.dtype,
            group=self.plan.group,
        )

    def expected_bytes(self, allocation: Allocation) -> int:
        """Return the bytes of the pack."""
        plan, figures = replace(self.plan, allocation=allocation), ("loss", "near", "far")
        counts, teaches = {"steps": 12345}, self._teaches(plan)
        record = sample_provenance(
            Minimax.name, self.source, self.settings, figures, counts, teaches=teaches
        )
        width = self.backbone.prompt_shape[1]
        pack = expected_bytes(plan, self.recipe(self.backbone), width, allocation, record)
        return pack + self.adapter_bytes

    def estimate(self) -> Estimate:
        """Measure a step and an image."""
        plan, backbone, allocation = self.plan, self.backbone, self.plan.allocation
        picture = torch.zeros((4, 3, *plan.size), dtype=torch.uint8)
        with torch.no_grad():
            encode = seconds_of(lambda: backbone.encode(picture)) / 4
        x = torch.zeros((4, *backbone.latent_shape_for(plan.size)), device=backbone.device)
        c = backbone.unconditional().expand(4)
        with torch.inference_mode():
            forward = seconds_of(lambda: backbone.denoise(x, 1.0, c)) / 4
            decode = seconds_of(lambda: backbone.decode(x)) / 4
        images = (allocation.judged + (allocation.labels != "none")) * plan.seeded
        stages = {}
        if self._teaches(plan) and self.settings.teacher == "train":
            stages["teacher"] = teacher_seconds(
                self.source, plan, self.settings, str(backbone.device)
            )
        stages |= {
            "encode": 2 * plan.images * encode,
            "tune": self.steps * tuning_seconds(backbone, plan.classes, self.own.batch),
            **draw_seconds(plan, backbone.latent_shape_for(plan.size)),
            "images": images * len(plan.classes) * (decode + forward * self.sampling.forwards),
        }
        if images := self.own.search_images:
            tried = grid(self.settings, fit=can_fit(backbone))
            few = searched(images, len(plan.classes))
            passes = fitting(tried, backbone.latent_shape_for(plan.size))
            passes += few * sum(sampling.forwards for sampling in tried)
            stages["sampler"] = few * len(tried) * decode + passes * forward
        if plan.coding is not None:
            code = code_seconds(backbone, plan, self.recipe(backbone), self.settings)
            stages["codes"] = code * plan.codes * len(plan.classes)
        return Estimate(self.expected_bytes(allocation), stages)

    def run(self, run: EncodeRun) -> Draft:
        """Tune the DiT, and search for a sampler where images are set for it."""
        plan, own, backbone = self.plan, self.own, self.backbone
        teacher = open_teacher(run, plan) if self._teaches(plan) else None
        tuned, seen = self._tuned(run), run.journal[IMAGES]
        if plan.dtype != "float32":
            backbone = self._opened_for_decoding(run)
        draft = Draft(
            recipe=self.recipe(backbone),
            prompts=tuned.prompts[:, None, None],
            backbone=backbone,
            teacher=teacher,
            adapter=encode_adapter(tuned.adapter, self.adapter) if tuned.adapter else None,
            metrics={"steps": self.steps, **tuned.figures},
            seen=seen,
            bad=plan.images - seen,
            real=partial(spread_images, run.source, plan.size[0]),
        )
        if not own.search_images:
            return draft
        return best_sampling(
            run, plan, draft, images=own.search_images, decode_seconds=own.decode_seconds
        )

    def _tuned(self, run: EncodeRun) -> Tuned:
        """Fine-tune the backbone; of several shards, one does it for all."""
        plan, backbone, journal = self.plan, self.backbone, run.journal
        searches = self.own.search_images > 0
        if run.once("fine-tune the backbone", _TUNED, last=not (searches or plan.makes_images)):
            _, latents = encode_images(run, backbone.encode, plan.size[0], 0)
            with fitted(backbone, plan.classes) as fit:
                tuning = FineTuning(fit, latents, self.own, self.steps, plan.seed)
                tuned = tuning.run(Checkpoint(journal, "tuning/state"), run.events)
            journal.save(_TUNED, {_PROMPTS: tuned.prompts, **tuned.adapter}, tuned.figures)
        arrays, figures = stored(journal, _TUNED)
        prompts = arrays.pop(_PROMPTS)
        return Tuned(arrays, prompts, figures)

    def _opened_for_decoding(self, run: EncodeRun) -> DiT:
        backbone = open_backbone(
            self.settings.backbone or "",
            device=run.context.device,
            dtype=getattr(torch, self.plan.dtype),
        )
        assert isinstance(backbone, DiT)
        return backbone


def adapter_bytes(backbone: DiT, classes: tuple[str, ...], codec: str) -> int:
    """Return the bytes of a section with everything that fine-tuning may move."""
    full = full_adapter(backbone, classes)
    coded = encode_adapter({name: v.numpy() for name, v in full.items()}, codec)
    table = sum(len(str(entry)) for entry in coded.params["table"])
    return coded.nbytes + table + 100  # and the rest of the entry
