"""Minimax diffusion (arXiv 2311.15529): a DiT fine-tuned to be representative and diverse.

Losses, memories, what learns (`difffit.py`) and all defaults are those of the authors' code:
AdamW at 1e-3 without decay, batches of 8, 8 passes, averages of 0.9999, a tenth of the labels
dropped, 64 latents a class and memory, weights 0.002 and 0.008, guidance 4. Ours, where it is
silent or does not carry over: latents are the autoencoder's means, not samples; a class unknown to
the backbone starts at the mean of the known rows; the sampler is one of the format's (theirs is
50 steps of DDPM with one seed for all images, so that image i depends on those before it); seeds,
labels and probes are D3M's. What was learned is the pack's adapter, the class rows its prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from d3pack.backbones import open_backbone
from d3pack.backbones.dit import DiT
from d3pack.encode.budget import BARE, MARGIN, table_dials
from d3pack.encode.complete import finish, sample_record
from d3pack.encode.estimate import seconds_of, teacher_seconds, timings
from d3pack.encode.method import Plan, Run
from d3pack.encode.methods.dit import best_sampled, encoded, told
from d3pack.encode.methods.minimax.difffit import fitted
from d3pack.encode.methods.minimax.finetune import FineTuning, Tuned, full_adapter, tuning_seconds
from d3pack.encode.options import EncodeOptions
from d3pack.encode.plan import Dials, dtype_for, sigmas_of, size_of, typical_side
from d3pack.encode.settings import need_between, read_settings
from d3pack.encode.teaching import open_teacher
from d3pack.errors import UsageError
from d3pack.format.codecs import encode_adapter, encode_prompts
from d3pack.format.pack import Pack
from d3pack.format.recipe import BackboneRef, DType, Recipe, Sampler
from d3pack.sources import Source
from d3pack.system.keeper import JournalKeeper

CODECS = ("f16", "i8")


@dataclass(frozen=True, slots=True)
class MinimaxSettings:
    """What `--set` may say; the defaults are the paper's."""

    epochs: int = 8
    batch: int = 8
    lr: float = 1e-3
    ema: float = 0.9999
    drop: float = 0.1  # labels left out
    memory: int = 64  # latents of each class in each memory
    representative: float = 0.002
    diverse: float = 0.008
    train_steps: int = 0  # 0: all epochs
    adapter: str = "f16"
    search_images: int = 0  # made for each setting of the sampler; 0: no search
    decode_seconds: float = 0.0  # limit of the search, for all images

    def __post_init__(self) -> None:
        if self.adapter not in CODECS:
            raise UsageError(f"adapter is {self.adapter!r}", hint=f"one of {', '.join(CODECS)}")
        need_between(self, 1, 1e9, "epochs", "batch", "memory")
        need_between(self, 1e-9, 1, "lr")
        need_between(self, 0, 1, "drop")
        need_between(self, 0, 1e3, "representative", "diverse")
        need_between(self, 0, 1e9, "train_steps", "search_images", "decode_seconds")
        if not 0 <= self.ema < 1:
            raise UsageError("ema lies between 0 and 1, and below 1")
        if self.decode_seconds and not self.search_images:
            raise UsageError(
                "decode_seconds limits the search of a sampler, and minimax makes none by itself",
                hint="--set search_images=200 makes one",
            )


@dataclass(frozen=True, slots=True)
class MinimaxPlan:
    """All settings of one run."""

    classes: tuple[str, ...]
    images: int
    images_per_class: int
    typical: int
    backbone: BackboneRef
    size: tuple[int, int]
    dtype: DType
    dials: Dials
    sampler: Sampler
    sampler_steps: int
    guidance: float
    guided_channels: int
    settings: MinimaxSettings
    group: int
    seed: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["notes"]
        value["backbone"] = {"repo": self.backbone.repo, "revision": self.backbone.revision}
        value["classes"] = len(self.classes)
        return value

    @property
    def steps(self) -> int:
        """Of the fine-tuning; a pass leaves out what does not fill a batch, as in the paper's."""
        whole = max(1, self.images // self.settings.batch) * self.settings.epochs
        return self.settings.train_steps or whole

    def lines(self) -> list[str]:
        dials, name = self.dials, self.backbone.repo or self.backbone.revision[:12]
        return [
            f"{len(self.classes)} classes, {self.images} images; "
            f"{self.images_per_class} to make of each class",
            f"backbone {name}, {self.size[0]}x{self.size[1]}, {self.dtype}; {self.sampler} "
            f"{self.sampler_steps} steps, guidance {self.guidance:g}",
            f"{self.steps} steps of {self.settings.batch}; adapter as {self.settings.adapter}, "
            f"class vectors as {dials.codec}, {dials.seeds(self.images_per_class)}, "
            f"labels {dials.labels}",
            *self.notes,
        ]


class Minimax:
    """Fine-tuning, seeds, labels."""

    name = "minimax"

    def __init__(self) -> None:
        self._backbone: DiT | None = None
        self._sizes: dict[str, int] = {}  # of the adapter, by codec

    def plan(self, source: Source, options: EncodeOptions, device: str) -> MinimaxPlan:
        """Settle every setting; the backbone must be a DiT."""
        settings = read_settings(MinimaxSettings, self.name, options.extra)
        if not options.backbone:
            raise UsageError(
                "minimax tunes a class-conditional DiT",
                hint="name it: --backbone facebook/DiT-XL-2-256, or what classcond has made",
            )
        backbone = open_backbone(options.backbone, device=device, dtype=torch.float32)
        if not isinstance(backbone, DiT):
            raise UsageError(
                f"minimax tunes a class-conditional DiT, and this is a {backbone.ref.kind}",
                hint="--method d3m takes it",
            )
        self._backbone = backbone
        size = options.size or backbone.image_size
        channels = backbone.latent_shape_for(size)[0]
        plan = MinimaxPlan(
            classes=source.classes,
            images=sum(source.counts),
            images_per_class=options.images_per_class,
            typical=typical_side(source),
            backbone=backbone.ref,
            size=size,
            dtype=dtype_for(device),
            dials=BARE,
            sampler=options.sampler or "dpmpp-2m",
            sampler_steps=options.sampler_steps or 20,
            guidance=4.0 if options.guidance is None else options.guidance,
            guided_channels=3 if channels == 4 else 0,  # as the sampling of DiT's own code
            settings=settings,
            group=options.group or 16,
            seed=options.seed,
        )
        if options.budget is not None and "adapter" not in options.extra:
            adapter = self._finest_adapter(source, plan, options)
            plan = replace(plan, settings=replace(settings, adapter=adapter))
        dials, notes = table_dials(
            options, lambda trial: self._bytes(source, replace(plan, dials=trial), options)
        )
        return replace(plan, dials=dials, notes=notes)

    def _finest_adapter(self, source: Source, plan: MinimaxPlan, options: EncodeOptions) -> str:
        """The finest codec of the adapter that leaves room for a pack at all."""
        assert options.budget is not None
        for codec in CODECS[:-1]:
            trial = replace(plan, settings=replace(plan.settings, adapter=codec))
            if self._bytes(source, trial, options) + MARGIN <= options.budget:
                return codec
        return CODECS[-1]

    def _bytes(self, source: Source, plan: MinimaxPlan, options: EncodeOptions) -> int:
        backbone = self._opened()
        figures = ("loss", "near", "far", *(["agreement"] if options.labels else []))
        pack = size_of(
            plan.classes,
            plan.images_per_class,
            self._recipe(plan, backbone),
            backbone.prompt_shape[1],
            plan.dials,
            sample_record(self.name, source, options, figures, {"steps": 12345}),
            plan.seed,
        )
        return pack + self._adapter_bytes(plan.classes, plan.settings.adapter)

    def _adapter_bytes(self, classes: tuple[str, ...], codec: str) -> int:
        """Of a section with everything that fine-tuning may move."""
        if codec not in self._sizes:
            whole = full_adapter(self._opened(), classes)
            coded = encode_adapter({name: v.numpy() for name, v in whole.items()}, codec)
            table = sum(len(str(entry)) for entry in coded.params["table"])
            self._sizes[codec] = coded.nbytes + table + 500  # and the section's entry
        return self._sizes[codec]

    def estimate(self, source: Source, plan: Plan, options: EncodeOptions) -> Mapping[str, Any]:
        """Measure a step and an image."""
        assert isinstance(plan, MinimaxPlan)
        backbone = self._opened()
        step = tuning_seconds(backbone, plan.classes, plan.settings.batch)
        picture = torch.zeros((4, 3, *plan.size), dtype=torch.uint8)
        with torch.no_grad():
            encode = seconds_of(lambda: backbone.encode(picture)) / 4
        made = plan.dials.candidates * (plan.dials.candidates > 1) + (plan.dials.labels != "none")
        x = torch.zeros((4, *backbone.latent_shape_for(plan.size)), device=backbone.device)
        c = backbone.unconditional().expand(4)
        with torch.inference_mode():
            forward = seconds_of(lambda: backbone.denoise(x, 1.0, c)) / 4
            decode = seconds_of(lambda: backbone.decode(x)) / 4
        image = decode + forward * plan.sampler_steps * (1 + (plan.guidance != 1.0))
        stages = {
            "encode": 2 * plan.images * encode,
            "tune": plan.steps * step,
            "images": made * plan.images_per_class * len(plan.classes) * image,
        }
        if options.teacher == "train":
            stages["teacher"] = teacher_seconds(source, plan.typical, options, backbone.device)
        return {
            "bytes": self._bytes(source, plan, options),
            **timings(stages),
        }

    def encode(self, run: Run) -> Pack:
        """All stages; each goes on where it was stopped."""
        plan, settings = run.plan, run.options
        assert isinstance(plan, MinimaxPlan)
        backbone = self._opened()
        teacher = open_teacher(run, plan.typical)
        photos, latents = encoded(run, backbone.encode, plan.size[0], 0)
        tuned = self._tune(run, plan, latents)
        if plan.dtype != "float32":
            dtype = getattr(torch, plan.dtype)
            opened = open_backbone(settings.backbone, device=run.device, dtype=dtype)
            assert isinstance(opened, DiT)
            backbone = opened
        adapter = tuned.adapter
        pack = Pack(
            classes=plan.classes,
            images_per_class=plan.images_per_class,
            recipe=self._recipe(plan, backbone),
            prompts=encode_prompts(tuned.prompts[:, None, None], plan.dials.codec),
            seed=plan.seed,
            adapter=encode_adapter(adapter, plan.settings.adapter) if adapter else None,
        )
        metrics: dict[str, Any] = {"steps": plan.steps, **tuned.figures}
        if plan.settings.search_images:
            pack, likeness = best_sampled(run, pack, backbone, teacher, photos, plan.settings)
            metrics |= likeness
        about = told(self.name, metrics, photos, plan.images)
        return finish(run, pack, plan.dials, backbone, teacher, about)

    def _opened(self) -> DiT:
        assert self._backbone is not None
        return self._backbone

    def _recipe(self, plan: MinimaxPlan, backbone: DiT) -> Recipe:
        return Recipe(
            backbone=plan.backbone,
            size=plan.size,
            sampler=plan.sampler,
            sigmas=sigmas_of(backbone, plan.sampler, plan.sampler_steps),
            guidance=plan.guidance,
            guided_channels=plan.guided_channels,
            dtype=plan.dtype,
            group=plan.group,
        )

    def _tune(self, run: Run, plan: MinimaxPlan, latents: Any) -> Tuned:
        keeper = JournalKeeper(run.journal, "tuning/state")
        with fitted(self._opened(), plan.classes) as fit:
            tuning = FineTuning(fit, latents, plan.settings, plan.steps, plan.seed)
            return tuning.run(keeper, run.events)
