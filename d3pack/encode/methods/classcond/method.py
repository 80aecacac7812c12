"""Data-efficient generation (arXiv 2409.03929): a class-conditional DiT of the source's own.

The paper trains a latent diffusion model from scratch and samples as many images as the time
allows; it names neither sizes, nor schedule, nor sampler, and there is no code. Ours are: a DiT
(where the paper has a U-ViT) in the latents of a given autoencoder, trained on v-prediction with
log-normal levels; a sampler by measurement (`search.py`); seeds, labels and probes as D3M has them.
The prompts of the pack are the rows of the model's class table.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d3pack.backbones import lock_directory, mini_directory, open_backbone
from d3pack.backbones.autoencoder import Autoencoder, open_autoencoder
from d3pack.backbones.dit import DiT
from d3pack.encode.budget import BARE, table_dials
from d3pack.encode.complete import finish, sample_record
from d3pack.encode.estimate import teacher_seconds, timings
from d3pack.encode.method import BACKBONE, Plan, Run
from d3pack.encode.methods.dit import best_sampled, carry, dit_costs, dit_weights, told, train_dit
from d3pack.encode.options import EncodeOptions
from d3pack.encode.plan import Dials, dtype_for, sigmas_of, size_of, typical_side
from d3pack.encode.search import grid
from d3pack.encode.settings import need_between, read_settings
from d3pack.encode.teaching import open_teacher
from d3pack.errors import UsageError
from d3pack.format.codecs import encode_prompts
from d3pack.format.pack import EMBEDDED, Pack
from d3pack.format.recipe import BackboneRef, DType, FileLock, Recipe
from d3pack.sources import Source
from d3pack.train.dit import DIT_MODELS, EXPORTED, VAE_FILES


@dataclass(frozen=True, slots=True)
class ClassSettings:
    """What `--set` and the flags of this method may say."""

    vae: str = ""  # a directory with config.json and weights; "": that of mini
    preset: str = ""  # "": small on a processor, base on an accelerator
    train_steps: int = 0  # 0: the preset's
    train_seconds: float = 0.0  # turned into steps, once, by the speed of the first ones
    decode_seconds: float = 0.0  # for all images of the pack; 0: as long as it takes
    embed: bool = False  # the pack carries the backbone, in eight bits a weight
    search_images: int = 200  # made for each setting of the sampler
    licence: str = "unknown"  # of the trained weights

    def __post_init__(self) -> None:
        names = ("train_steps", "train_seconds", "decode_seconds", "search_images")
        need_between(self, 0, 1e9, *names)


@dataclass(frozen=True, slots=True)
class ClassPlan:
    """All settings of one run."""

    classes: tuple[str, ...]
    images: int
    images_per_class: int
    typical: int
    size: tuple[int, int]
    dtype: DType
    dials: Dials
    preset: str
    vae: str  # SHA-256 of its files
    settings: ClassSettings
    group: int
    seed: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["settings"], value["notes"]  # options say them
        value["preset"] = {"name": self.preset, **asdict(DIT_MODELS[self.preset])}
        value["classes"] = len(self.classes)
        return value

    def lines(self) -> list[str]:
        dials, settings = self.dials, self.settings
        length = (
            f"{settings.train_seconds:.0f} s"
            if settings.train_seconds
            else f"{settings.train_steps or DIT_MODELS[self.preset].loop.steps} steps"
        )
        place = ", carried in the pack" if settings.embed else ""
        limit = f" within {settings.decode_seconds:g} s" if settings.decode_seconds else ""
        return [
            f"{len(self.classes)} classes, {self.images} images; "
            f"{self.images_per_class} to make of each class",
            f"a DiT of preset {self.preset}, {self.size[0]}x{self.size[1]}, trained for {length}"
            f"{place}",
            f"class vectors as {dials.codec}, {dials.seeds(self.images_per_class)}, "
            f"labels {dials.labels}; sampler by measurement{limit}",
            *self.notes,
        ]


class ClassCond:
    """Teacher, training, sampler, seeds, labels."""

    name = "classcond"

    def __init__(self) -> None:
        self._vae = Path()

    def plan(self, source: Source, options: EncodeOptions, device: str) -> ClassPlan:
        """Settle every setting; opens the autoencoder to know its latents."""
        settings = read_settings(ClassSettings, self.name, options.extra)
        self._vae = Path(settings.vae) if settings.vae else mini_directory() / "vae"
        for name in VAE_FILES:
            if not (self._vae / name).is_file():
                raise UsageError(
                    f"the autoencoder directory has no {name}",
                    hint="give one that save_pretrained wrote: --vae DIR",
                )
        preset = settings.preset or ("small" if device.startswith("cpu") else "base")
        if preset not in DIT_MODELS:
            raise UsageError(f"no preset {preset!r}", hint=f"presets: {', '.join(DIT_MODELS)}")
        if options.backbone:
            raise UsageError("classcond trains its own backbone", hint="leave --backbone out")
        typical = typical_side(source)
        step = _autoencoder(self._vae, "cpu").factor * DIT_MODELS[preset].patch
        side = min(typical, DIT_MODELS[preset].max_side)
        size = options.size or (max(step, side // step * step),) * 2
        if size[0] != size[1] or size[0] % step:
            raise UsageError(f"the side must be a multiple of {step} here")
        plan = ClassPlan(
            classes=source.classes,
            images=sum(source.counts),
            images_per_class=options.images_per_class,
            typical=typical,
            size=size,
            dtype=dtype_for(device),
            dials=BARE,
            preset=preset,
            vae=_digest(self._vae),
            settings=settings,
            group=options.group or 16,
            seed=options.seed,
        )
        carried = self._carried(plan)
        dials, notes = table_dials(
            options, lambda trial: _bytes(source, replace(plan, dials=trial), options) + carried
        )
        return replace(plan, dials=dials, notes=notes)

    def _carried(self, plan: ClassPlan) -> int:
        """Bytes of a backbone in the pack, about: one a weight, and half of the autoencoder."""
        if not plan.settings.embed:
            return 0
        vae = _autoencoder(self._vae, "cpu")
        side = plan.size[0] // vae.factor
        weights = dit_weights(DIT_MODELS[plan.preset], vae.channels, side, len(plan.classes))
        return weights + sum((self._vae / name).stat().st_size for name in VAE_FILES) // 2

    def estimate(self, source: Source, plan: Plan, options: EncodeOptions) -> Mapping[str, Any]:
        """Measure a few steps of the training and a few images."""
        assert isinstance(plan, ClassPlan)
        config, settings = DIT_MODELS[plan.preset], plan.settings
        vae = _autoencoder(self._vae, options.device or "cpu")
        costs = dit_costs(source, config, vae, plan.size[0], len(plan.classes))
        made = 1 if plan.dials.candidates == 1 else plan.dials.candidates + 1
        images = made * plan.images_per_class * len(plan.classes)
        steps = settings.train_steps or config.loop.steps
        stages = {
            "read and encode": sum(source.counts) * costs.read_and_encode,
            "train": settings.train_seconds or steps * config.loop.batch * costs.train,
            "sampler": len(grid(options)) * settings.search_images * costs.image,
            "images": images * costs.image,
        }
        if options.teacher == "train":
            device = torch.device(options.device or "cpu")
            stages["teacher"] = teacher_seconds(source, plan.typical, options, device)
        return {
            "bytes": _bytes(source, plan, options) + self._carried(plan),
            **timings(stages),
        }

    def encode(self, run: Run) -> Pack:
        """All stages; each goes on where it was stopped."""
        plan = run.plan
        assert isinstance(plan, ClassPlan)
        teacher = open_teacher(run, plan.typical)
        config = DIT_MODELS[plan.preset]
        vae = _autoencoder(self._vae, run.device)
        trained = train_dit(run, config, vae, self._vae, plan.size[0], plan.settings)
        photos = trained.photos
        carried = carry(run.journal, trained.folder) if plan.settings.embed else None
        folder = trained.folder if carried is None else carried.folder
        if carried is None:
            shutil.copytree(folder, run.journal.path(BACKBONE), dirs_exist_ok=True)
        backbone = open_backbone(
            lock_directory(folder, licence=plan.settings.licence),
            path=folder,
            device=run.device,
            dtype=getattr(torch, plan.dtype),
        )
        assert isinstance(backbone, DiT)
        rows = [backbone.label(c).tensors["vector"][0, 0] for c in range(len(plan.classes))]
        values = torch.stack(rows).float().cpu().numpy()[:, None, None]
        pack = Pack(
            classes=plan.classes,
            images_per_class=plan.images_per_class,
            recipe=Recipe(
                backbone=backbone.ref,
                size=plan.size,
                sampler="dpmpp-2m",
                sigmas=sigmas_of(backbone, "dpmpp-2m", 8),
                dtype=plan.dtype,
                group=plan.group,
            ),
            prompts=encode_prompts(values, plan.dials.codec),
            seed=plan.seed,
            optional={} if carried is None else {EMBEDDED: {}},
            extensions={} if carried is None else {EMBEDDED: carried.coded},
        )
        pack, likeness = best_sampled(run, pack, backbone, teacher, photos, plan.settings)
        metrics = {
            "steps": trained.steps,
            "samples": trained.samples,
            "held_loss": trained.held_loss,
            **likeness,
        }
        about = told(self.name, metrics, photos, plan.images)
        return finish(run, pack, plan.dials, backbone, teacher, about)


def _bytes(source: Source, plan: ClassPlan, options: EncodeOptions) -> int:
    """Of the pack: with names of files as export writes them, and figures of the usual length."""
    lock = FileLock(1_000_000, "0" * 64)
    ref = BackboneRef("dit", "", "0" * 40, dict.fromkeys(EXPORTED, lock), plan.settings.licence)
    sigmas = tuple(round(14.61464 * 0.5**i, 6) for i in range(8))
    recipe = Recipe(ref, plan.size, "dpmpp-2m", (*sigmas, 0.0), 1.5, group=plan.group)
    figures = ("held_loss", "right", "distance", *(["agreement"] if options.labels else []))
    counts = {"steps": 12345, "samples": 1234567}
    record = sample_record(ClassCond.name, source, options, figures, counts)
    width = DIT_MODELS[plan.preset].width
    count = plan.images_per_class
    return size_of(plan.classes, count, recipe, width, plan.dials, record, plan.seed)


def _autoencoder(path: Path, device: str) -> Autoencoder:
    return open_autoencoder(path, device=torch.device(device), dtype=torch.float32)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in VAE_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
