"""`train_backbone`: all stages in order, each resumed where it stopped, then the export."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from d3pack.backbones import Levels, lock_directory, mini_directory
from d3pack.errors import UsageError
from d3pack.sources import open_source
from d3pack.system import (
    Counter,
    count,
    digest,
    disk_full_as_error,
    throttled,
    write_text,
    writing,
)
from d3pack.train.autoencoder import AutoencoderModule, AutoencoderTask
from d3pack.train.config import PRESETS, LoopConfig, TrainConfig
from d3pack.train.data import (
    SKIPPED,
    Photos,
    cached_latents,
    encode_pixels,
    held_out_latents,
    load_photos,
    spoken,
)
from d3pack.train.diffusion import SCHEDULE, DenoiserModule, DiffusionTask, build_unet, load_unet
from d3pack.train.export import export_backbone
from d3pack.train.loop import CHECKPOINT, Report, Task, accelerator_on, run_stage
from d3pack.train.settings import STAGES, TrainSettings
from d3pack.train.text import (
    TextConditioner,
    TextModule,
    TextTask,
    scattered_vectors,
    sentence_vectors,
    train_tokenizer,
)

LOG = logging.getLogger(__name__)
WIDTH_WITHOUT_ENCODER = 384


class TrainingRun:
    """The state that stages pass on to each other."""

    def __init__(
        self,
        source: str,
        output: Path,
        settings: TrainSettings,
        config: TrainConfig,
        report: Report,
    ) -> None:
        self.source, self.output = source, output
        self.settings, self.config, self.report = settings, config, report
        self.stages = settings.trained_stages
        self.start = _start_directory(settings.init_from) if settings.init_from else None
        self.work = output / "training"
        self.cache = self.work / "cache"
        self.accelerator = accelerator_on(settings.device)
        self.photos = self._photos()
        self._report_skipped()

    def _photos(self) -> Photos:
        with self.accelerator.main_process_first():
            source = open_source(self.source)
            self._check_same(source.fingerprint())
            return load_photos(
                source,
                self.cache,
                self.config.image_size,
                self.config.hold_back,
                self._counter("photos"),
            )

    def _report_skipped(self) -> None:
        path = self.cache / SKIPPED
        # the list may be of an earlier run, which read the images
        skipped = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        if skipped and self.accelerator.is_main_process:
            LOG.info("skipped %s: %s names them", count(skipped, "file"), path)

    def _counter(self, what: str) -> Counter:
        def update(done: int, total: int) -> None:
            if self.accelerator.is_main_process:
                self.report({"stage": what, "step": done, "progress": done / total})

        return throttled(update)

    def _check_same(self, fingerprint: str) -> None:
        """Refuse a directory that was started with another source or other settings."""
        files = {
            "init_from": _start_digest(self.start),
            "sentence_encoder": digest(self.settings.sentence_encoder),
            "words": digest(self.settings.words),
        }
        now = {"source": fingerprint, "config": asdict(self.config), **files}
        path = self.work / "settings.json"
        text = json.dumps(now, indent=1, sort_keys=True)
        if path.exists():
            before = {**dict.fromkeys(files), **json.loads(path.read_text())}
            other = [key for key, value in json.loads(text).items() if before.get(key) != value]
            if other:
                raise UsageError(
                    f"{self.output} was started with another source or other settings"
                    f" ({', '.join(other)})",
                    hint="choose another output, or the same settings to continue",
                )
        write_text(path, text)

    def stage(self, task: Task, loop: LoopConfig) -> nn.Module:
        """Train a stage, or load its last checkpoint where it is not to be trained."""
        seconds = self.settings.time_budget
        return run_stage(
            task,
            loop,
            self.work / task.name,
            self.accelerator,
            seconds=seconds * loop.share / self._shares() if seconds else None,
            checkpoint_minutes=self.config.checkpoint_minutes,
            report=self.report,
            compiled=self.settings.compile,
            train=task.name in self.stages,
        )

    def _shares(self) -> float:
        """Return the sum of the shares of the stages to train, which split the time budget."""
        config = self.config
        loops = (config.autoencoder.loop, config.text.loop, config.diffusion.loop)
        named = zip(STAGES, loops, strict=True)
        return sum(loop.share for stage, loop in named if stage in self.stages)

    def missing(self) -> list[str]:
        """Return the stages after the last one to train that have no checkpoint yet."""
        last = max(map(STAGES.index, self.stages))
        trained: set[str] = {stage for stage in STAGES if (self.work / stage / CHECKPOINT).exists()}
        if self.start:
            trained.add("text")
        return [stage for stage in STAGES[last + 1 :] if stage not in trained]

    def autoencoder(self) -> AutoencoderTiny:
        start = self.start
        if start and "autoencoder" not in self.stages:
            model = AutoencoderTiny.from_pretrained(start / "vae", torch_dtype=torch.float32)
            return cast(AutoencoderTiny, model.to(self.accelerator.device).eval())
        task = AutoencoderTask(self.config.autoencoder, self.photos, self.config.seed, start)
        module = self.stage(task, self.config.autoencoder.loop)
        assert isinstance(module, AutoencoderModule)
        return module.model.eval()

    def text(self) -> tuple[CLIPTextModel, CLIPTokenizer]:
        start = self.start
        if start and "text" not in self.stages:
            model = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
            return model.eval(), CLIPTokenizer.from_pretrained(start / "tokenizer")
        config = self.config.text
        names, vectors = self._words()
        folder = self.work / "text" / "tokenizer"
        with self.accelerator.main_process_first():
            if start:
                CLIPTokenizer.from_pretrained(start / "tokenizer").save_pretrained(folder)
            elif not (folder / "tokenizer.json").exists():
                train_tokenizer(names, config.vocabulary, config.max_tokens).save_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        classes = len(self.photos.names)
        task = TextTask(config, tokenizer, names, vectors, classes, self.config.seed, start)
        module = self.stage(task, config.loop)
        assert isinstance(module, TextModule)
        return module.model.eval(), tokenizer

    def _words(self) -> tuple[list[str], np.ndarray[Any, np.dtype[np.float32]]]:
        """Return class names, then the other words, and a vector for each."""
        names = list(self.photos.names)
        if self.settings.words:
            more = {spoken(line) for line in self.settings.words.read_text().splitlines()}
            names += sorted(more - set(names) - {""})
        encoder = self.settings.sentence_encoder
        if encoder is None:
            return names, scattered_vectors(names, WIDTH_WITHOUT_ENCODER, self.config.seed)
        path = self.cache / "words.npy"
        with self.accelerator.main_process_first():
            if not path.exists():
                vectors = sentence_vectors(names, encoder)
                with writing(path) as temporary, temporary.open("xb") as file:
                    np.save(file, vectors)
        return names, np.load(path)

    def diffusion(
        self, autoencoder: AutoencoderTiny, text: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> UNet2DConditionModel:
        config, photos = self.config.diffusion, self.photos
        shown = config.previews // 2  # classes, two images each
        encode = partial(encode_pixels, autoencoder.eval().to(memory_format=torch.channels_last))
        with self.accelerator.main_process_first():
            latents = cached_latents(
                photos,
                encode,
                self.cache,
                config.collage_share,
                self.config.seed,
                self._counter("latents"),
            )
        device = self.accelerator.device

        @torch.no_grad()
        def decode(z: Tensor) -> Tensor:
            scale = autoencoder.config.scaling_factor
            return torch.cat(
                [autoencoder.decoder(p.to(device) / scale) for p in torch.split(z, 32)]
            )

        def build() -> UNet2DConditionModel:
            if self.start:
                return load_unet(self.start / "unet")
            _, channels, size, _ = latents.values.shape
            return build_unet(config, channels, size, text.config.hidden_size)

        task = DiffusionTask(
            config,
            build,
            latents,
            held_out_latents(photos, encode),
            TextConditioner(text, tokenizer, photos.names, config.caption_drop),
            decode,
            [i * len(photos.names) // shown for i in range(shown)] * 2,
            self.config.seed,
            Levels.from_config(SCHEDULE),
        )
        module = self.stage(task, config.loop)
        assert isinstance(module, DenoiserModule)
        return cast(UNet2DConditionModel, module.model)


def _start_digest(start: Path | None) -> str | None:
    """Return a digest of a backbone by its lock, which is quicker than its weights."""
    if start is None:
        return None
    lock = start / "lock.json"
    return digest(lock) if lock.is_file() else lock_directory(start).revision


def _start_directory(name: str) -> Path:
    """Return the directory of the backbone to start from."""
    path = mini_directory() if name == "mini" else Path(name)
    if not (path / "unet" / "config.json").is_file():
        raise UsageError(f"{name} holds no backbone", hint="give a directory that training wrote")
    return path


@disk_full_as_error()
def train_backbone(
    source: str | Path,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    config: TrainConfig | None = None,
    report: Report = lambda entry: None,
) -> Path | None:
    """Train a text-to-image backbone on the images of a source.

    All work is kept in `output`: after an interruption, the same call continues it. Run under
    `torchrun` or `accelerate launch`, several GPUs train one model.

    Args:
        source: images in class folders, archives, shards, parquet or `hf://datasets/...`.
        output: directory of the backbone, in diffusers' Stable Diffusion layout.
        settings: what to train and for how long.
        config: sizes and learning rates, instead of those of `settings.preset`.
        report: called with a dictionary at every step of progress.

    Returns:
        The directory, or None where later stages are still to be trained.

    Raises:
        UsageError: the directory was started with another source or other settings.
        SourceError: a class has no image that can be read.
        NoSpaceError: the disk is full; the same call continues when there is room.

    Example:
        >>> from d3pack.train import TrainSettings, train_backbone
        >>> settings = TrainSettings(preset="tiny", time_budget=5400)
        >>> train_backbone("photos/", "backbone/", settings)  # doctest: +SKIP
        PosixPath('backbone')
    """
    settings = settings or TrainSettings()
    config = config or replace(PRESETS[settings.preset], seed=settings.seed)
    output = Path(output)
    disable_progress_bar()
    run = TrainingRun(str(source), output, settings, config, report)
    missing = run.missing()
    autoencoder = run.autoencoder()
    if "text" not in missing:
        text, tokenizer = run.text()
    if missing:
        if run.accelerator.is_main_process:
            LOG.info(
                "%s is not a backbone yet: still missing: %s; train them into the same directory",
                output,
                ", ".join(missing),
            )
        return None
    unet = run.diffusion(autoencoder, text, tokenizer)
    if run.accelerator.is_main_process:
        export_backbone(
            output,
            autoencoder=autoencoder,
            text=text,
            tokenizer=tokenizer,
            unet=unet,
            licence=settings.licence,
        )
    return output
