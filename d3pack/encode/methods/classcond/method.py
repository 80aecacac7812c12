"""Data-efficient generation (arXiv 2409.03929): a class-conditional DiT of the source's own.

The paper trains a latent diffusion model from scratch and samples as many images as the time
allows; it names neither sizes, nor schedule, nor sampler, and there is no code. Ours are: a DiT
(where the paper has a U-ViT) in the latents of an autoencoder, trained on v-prediction with
log-normal levels; a sampler by measurement (`sampler_search.py`); seeds, labels and probes as D3M
has them. The prompts of the pack are the rows of the model's class table.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from d3pack.backbones import (
    Autoencoder,
    DiT,
    lock_directory,
    mini_directory,
    open_autoencoder,
    open_backbone,
)
from d3pack.encode.allocation import SMALLEST, Allocation, expected_bytes
from d3pack.encode.codes import tried_of
from d3pack.encode.contract import Draft, EncodeContext, EncodeRun, Estimate
from d3pack.encode.estimate import teacher_seconds
from d3pack.encode.finish import sample_provenance
from d3pack.encode.methods.classcond.training import dit_bytes, embed, measure_costs, trained_dit
from d3pack.encode.methods.dit import IMAGES, allocate_rows, spread_images
from d3pack.encode.plan import EncodePlan, dtype_for, sigmas_of, typical_side
from d3pack.encode.sampler_fit import STEPS as FITTED_STEPS
from d3pack.encode.sampler_fit import unfitted
from d3pack.encode.sampler_search import best_sampling, fitting, grid, searched
from d3pack.encode.sets import draw_seconds
from d3pack.encode.settings import ClassCondSettings, EncodeSettings
from d3pack.encode.teaching import open_teacher
from d3pack.errors import UsageError
from d3pack.format import BackboneRef, Recipe, encode_files
from d3pack.sources import Source
from d3pack.train import DIT_MODELS, VAE_FILES, DiTConfig


class ClassCond:
    """Teacher, training of a model, search for a sampler."""

    name = "classcond"
    settings = ClassCondSettings

    def prepare(
        self,
        source: Source,
        settings: EncodeSettings,
        own: ClassCondSettings,
        context: EncodeContext,
    ) -> ClassCondJob:
        """Settle every setting; opens the autoencoder to know its latents."""
        folder = own.vae or mini_directory() / "vae"
        for name in VAE_FILES:
            if not (folder / name).is_file():
                raise UsageError(
                    f"the autoencoder directory has no {name}",
                    hint="set vae to a directory that save_pretrained wrote",
                )
        model = own.model or ("small" if context.device.startswith("cpu") else "base")
        if settings.backbone:
            raise UsageError("classcond trains its own backbone: expected no backbone")
        vae = _open(folder, "cpu")
        typical = typical_side(source)
        plan = EncodePlan.of(
            source,
            settings,
            size=_size(settings, typical, vae, DIT_MODELS[model]),
            dtype=dtype_for(context.device),
            allocation=SMALLEST,
            typical=typical,
            details={
                "model": {"name": model, **asdict(DIT_MODELS[model])},
                "vae": _digest(folder),
            },
        )
        embedded = _embedded_bytes(folder, vae, model, plan, own.embed_bits) if own.embed else 0
        job = ClassCondJob(source, settings, own, context, plan, model, folder, embedded)
        allocation, notes = allocate_rows(settings, job.expected_bytes)
        text = (*_text(plan, own, model, allocation), *notes)
        return replace(job, plan=replace(plan, allocation=allocation, text=text))


def _size(
    settings: EncodeSettings, typical: int, vae: Autoencoder, config: DiTConfig
) -> tuple[int, int]:
    """The typical side in full patches, and at most the model's."""
    step = vae.factor * config.patch
    side = min(typical, config.max_side)
    size = settings.size or (max(step, side // step * step),) * 2
    if size[0] != size[1] or size[0] % step:
        raise UsageError(
            f"invalid size {size[0]}x{size[1]}: expected a square with a side that is a multiple "
            f"of {step}"
        )
    return size


def _embedded_bytes(folder: Path, vae: Autoencoder, model: str, plan: EncodePlan, bits: int) -> int:
    """About the bytes of a backbone in the pack."""
    side = plan.size[0] // vae.factor
    weights = dit_bytes(DIT_MODELS[model], vae.channels, side, len(plan.classes), bits)
    return weights + encode_files({n: (folder / n).read_bytes() for n in VAE_FILES}).nbytes


def _text(
    plan: EncodePlan, own: ClassCondSettings, model: str, allocation: Allocation
) -> tuple[str, ...]:
    length = (
        f"{own.train_seconds:.0f} s"
        if own.train_seconds
        else f"{own.train_steps or DIT_MODELS[model].loop.steps} steps"
    )
    place = f", carried in the pack in {own.embed_bits} bits a weight" if own.embed else ""
    limit = f" within {own.decode_seconds:g} s" if own.decode_seconds else ""
    return (
        f"a DiT of size {model}, {plan.size[0]}x{plan.size[1]}, trained for {length}{place}",
        f"class vectors as {allocation.codec}, {allocation.seeds(plan.seeded)}, "
        f"labels {allocation.labels}; sampler by measurement{limit}",
    )


@dataclass(frozen=True, slots=True)
class ClassCondJob:
    """A model to be trained on the source."""

    source: Source
    settings: EncodeSettings
    own: ClassCondSettings
    context: EncodeContext
    plan: EncodePlan
    model: str
    vae: Path  # directory of the autoencoder
    embedded: int  # about the bytes of the backbone in the pack

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        return self.plan

    def expected_bytes(self, allocation: Allocation) -> int:
        """Return the bytes of the pack, with file names and figures as long as the real ones."""
        plan = self.plan
        ref = BackboneRef("dit", "", licence=self.own.licence, lock="0" * 64, nbytes=10**8)
        sigmas = tuple(round(14.61464 * 0.5**i, 6) for i in range(8))
        recipe = Recipe(ref, plan.size, "dpmpp-2m", (*sigmas, 0.0), 1.5, group=plan.group)
        figures = ("held_loss", "right", "distance")
        counts = {"steps": 12345, "samples": 1234567}
        record = sample_provenance(ClassCond.name, self.source, self.settings, figures, counts)
        if any(sampling.sampler == "table" for sampling in grid(self.settings, fit=True)):
            recipe = unfitted(recipe, FITTED_STEPS)
        width = DIT_MODELS[self.model].width
        return self.embedded + expected_bytes(plan, recipe, width, allocation, record)

    def estimate(self) -> Estimate:
        """Measure a few steps of the training and a few images."""
        plan, own, config = self.plan, self.own, DIT_MODELS[self.model]
        classes, vae = len(plan.classes), _open(self.vae, self.context.device)
        costs = measure_costs(self.source, config, vae, plan.size[0], classes)
        allocation = plan.allocation
        images = (allocation.judged + (allocation.labels != "none")) * plan.seeded
        steps = own.train_steps or config.loop.steps
        samplings = grid(self.settings, fit=True)
        shape = (vae.channels, *(side // vae.factor for side in plan.size))
        stages = {}
        if self.settings.teacher == "train":
            stages["teacher"] = teacher_seconds(
                self.source, plan, self.settings, self.context.device
            )
        stages |= {
            "read and encode": sum(self.source.counts) * costs.read_and_encode,
            "train": own.train_seconds or steps * config.loop.batch * costs.train,
            "sampler": len(samplings) * searched(own.search_images, classes) * costs.image
            + fitting(samplings, shape) * costs.forward,
            **draw_seconds(plan, shape),
            "images": images * classes * costs.image,
        }
        if plan.coding is not None:  # a pass for each choice at each level
            passes = len(plan.coding.atoms) * tried_of(self.settings, plan, shape)
            stages["codes"] = passes * costs.forward * plan.codes * classes
        return Estimate(self.expected_bytes(plan.allocation), stages)

    def run(self, run: EncodeRun) -> Draft:
        """Train a teacher and the model, then search for a sampler."""
        plan, own = self.plan, self.own
        device = run.context.device
        teacher = open_teacher(run, plan)
        vae = _open(self.vae, device)
        trained = trained_dit(run, DIT_MODELS[self.model], vae, self.vae, plan.size[0], own)
        folder, coded = trained.folder, None
        if own.embed:
            folder, coded = embed(run.journal, folder, own.embed_bits)
        backbone = open_backbone(
            lock_directory(folder, licence=own.licence),
            path=folder,
            device=device,
            dtype=getattr(torch, plan.dtype),
        )
        assert isinstance(backbone, DiT)
        rows = [backbone.label(c).tensors["vector"][0, 0] for c in range(len(plan.classes))]
        seen = run.journal[IMAGES]
        draft = Draft(
            recipe=Recipe(
                backbone=backbone.ref,
                size=plan.size,
                sampler="dpmpp-2m",
                sigmas=sigmas_of(backbone, "dpmpp-2m", 8, plan.size),
                dtype=plan.dtype,
                group=plan.group,
            ),
            prompts=torch.stack(rows).float().cpu().numpy()[:, None, None],
            backbone=backbone,
            teacher=teacher,
            embedded=coded,
            trained=None if own.embed else trained.folder,
            metrics={
                "steps": trained.steps,
                "samples": trained.samples,
                "held_loss": trained.validation_loss,
            },
            seen=seen,
            bad=plan.images - seen,
            real=partial(spread_images, run.source, plan.size[0]),
        )
        return best_sampling(
            run, plan, draft, images=own.search_images, decode_seconds=own.decode_seconds
        )


def _open(folder: Path, device: str) -> Autoencoder:
    return open_autoencoder(folder, device=torch.device(device), dtype=torch.float32)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in VAE_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
