"""`train`: all stages in order, each resumed where it stopped, and the export at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from d3pack.backbones.levels import Levels
from d3pack.backbones.resolve import lock_directory
from d3pack.errors import UsageError
from d3pack.sources import open_source
from d3pack.system.files import digest, full_disk_named, write_text
from d3pack.system.text import count
from d3pack.train.autoencoder import AutoencoderModule, AutoencoderTask
from d3pack.train.conditioning import TextConditioner
from d3pack.train.config import LoopConfig, TrainConfig
from d3pack.train.diffusion import SCHEDULE, DenoiserModule, DiffusionTask, build_unet, load_unet
from d3pack.train.export import export_backbone
from d3pack.train.latents import Latents, encode_pixels, load_latents
from d3pack.train.loop import SAVED, Report, Task, run_stage
from d3pack.train.photos import SKIPPED, Photos, load_photos
from d3pack.train.text import TextModule, TextTask
from d3pack.train.words import scattered_vectors, sentence_vectors, spoken, train_tokenizer

LOG = logging.getLogger(__name__)
STAGES = ("autoencoder", "text", "diffusion")
WIDTH_WITHOUT_TEACHER = 384


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What the command adds to a preset."""

    source: str
    out: Path
    seconds: float | None = None  # for all stages together, shared out by the preset
    device: str = ""  # "": the best there is
    stages: tuple[str, ...] = STAGES
    sentence_encoder: Path | None = None
    words: Path | None = None  # one noun a line: vocabulary beyond the class names
    init_from: Path | None = None
    licence: str = "unknown"
    compiled: bool = False


class _Run:
    """The state that stages hand on to each other."""

    def __init__(self, options: TrainOptions, config: TrainConfig, report: Report) -> None:
        self.options, self.config, self.report = options, config, report
        self.work = options.out / "training"
        self.cache = self.work / "cache"
        self.accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="bf16")
        self.photos = self._photos()
        self._tell_skipped()

    def _photos(self) -> Photos:
        with self.accelerator.main_process_first():
            source = open_source(self.options.source)
            self._check_same(source.fingerprint())
            return load_photos(
                source,
                self.cache,
                self.config.image_size,
                self.config.hold_back,
                self._counter("photos"),
            )

    def _tell_skipped(self) -> None:
        path = self.cache / SKIPPED
        # the images may have been read by an earlier run; one of an earlier version lists nothing
        bad = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        if bad and self.accelerator.is_main_process:
            LOG.info("skipped %s: %s names them", count(bad, "file"), path)

    def _counter(self, what: str) -> Callable[[int, int], None]:
        """A listener that reports about twice a second."""
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            main = self.accelerator.is_main_process
            if main and (time.monotonic() - last > 0.5 or done == total):
                self.report({"stage": what, "step": done, "progress": done / total})
                last = time.monotonic()

        return tell

    def _check_same(self, fingerprint: str) -> None:
        """A folder belongs to one source and one set of settings."""
        options = self.options
        given = {
            "--init-from": _start_digest(options.init_from),
            "--sentence-encoder": digest(options.sentence_encoder),
            "--words": digest(options.words),
        }
        now = {"source": fingerprint, "config": asdict(self.config), **given}
        path = self.work / "settings.json"
        text = json.dumps(now, indent=1, sort_keys=True)
        if path.exists():
            # a folder of an earlier version knows nothing of what else was given: nothing was
            before = {**dict.fromkeys(given), **json.loads(path.read_text())}
            other = [key for key, value in json.loads(text).items() if before.get(key) != value]
            if other:
                raise UsageError(
                    f"{options.out} was started with another source or other settings"
                    f" ({', '.join(other)})",
                    hint="give another -o, or the same as before to go on",
                )
        write_text(path, text)

    def stage(self, task: Task, loop: LoopConfig) -> nn.Module:
        """Train one stage if it was asked for; otherwise take what its last checkpoint holds."""
        seconds = self.options.seconds
        return run_stage(
            task,
            loop,
            self.work / task.name,
            self.accelerator,
            seconds=seconds * loop.share / self._shares() if seconds else None,
            checkpoint_minutes=self.config.checkpoint_minutes,
            report=self.report,
            compiled=self.options.compiled,
            train=task.name in self.options.stages,
        )

    def _shares(self) -> float:
        """A budget is for the stages that are asked for: together they take the whole of it."""
        config = self.config
        loops = (config.autoencoder.loop, config.text.loop, config.diffusion.loop)
        named = zip(STAGES, loops, strict=True)
        return sum(loop.share for stage, loop in named if stage in self.options.stages)

    def missing(self) -> list[str]:
        """The stages behind the last one asked for that nothing has trained so far."""
        last = max(map(STAGES.index, self.options.stages))
        found = {stage for stage in STAGES if (self.work / stage / SAVED).exists()}
        if self.options.init_from:
            found.add("text")
        return [stage for stage in STAGES[last + 1 :] if stage not in found]

    def autoencoder(self) -> AutoencoderTiny:
        start = self.options.init_from
        if start and "autoencoder" not in self.options.stages:
            found = AutoencoderTiny.from_pretrained(start / "vae", torch_dtype=torch.float32)
            return cast(AutoencoderTiny, found.to(self.accelerator.device).eval())
        task = AutoencoderTask(self.config.autoencoder, self.photos, self.config.seed, start)
        module = self.stage(task, self.config.autoencoder.loop)
        assert isinstance(module, AutoencoderModule)
        return module.model.eval()

    def text(self) -> tuple[CLIPTextModel, CLIPTokenizer]:
        start = self.options.init_from
        if start and "text" not in self.options.stages:
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
        """Class names first, then the vocabulary; and where each lies."""
        names = list(self.photos.names)
        if self.options.words:
            more = {spoken(line) for line in self.options.words.read_text().splitlines()}
            names += sorted(more - set(names) - {""})
        encoder = self.options.sentence_encoder
        if encoder is None:
            return names, scattered_vectors(names, WIDTH_WITHOUT_TEACHER, self.config.seed)
        path = self.cache / "words.npy"
        with self.accelerator.main_process_first():
            if not path.exists():
                np.save(path, sentence_vectors(names, encoder))
        return names, np.load(path)

    def diffusion(
        self, autoencoder: AutoencoderTiny, text: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> UNet2DConditionModel:
        config, photos = self.config.diffusion, self.photos
        shown = config.previews // 2  # classes, two images each
        with self.accelerator.main_process_first():
            latents = load_latents(
                photos,
                autoencoder,
                self.cache,
                config.collage_share,
                self.config.seed,
                self._counter("latents"),
            )
        held = np.concatenate(
            [
                encode_pixels(autoencoder, photos.pixels[rows]).cpu().half().numpy()
                for rows in np.array_split(photos.held, max(1, len(photos.held) // 256))
            ]
        )
        judged = Latents(held, photos.labels[photos.held], np.zeros(len(held), np.bool_))
        device = self.accelerator.device

        @torch.no_grad()
        def decode(z: Tensor) -> Tensor:
            scale = autoencoder.config.scaling_factor
            return torch.cat(
                [autoencoder.decoder(p.to(device) / scale) for p in torch.split(z, 32)]
            )

        def build() -> UNet2DConditionModel:
            if self.options.init_from:
                return load_unet(self.options.init_from / "unet")
            _, channels, size, _ = latents.values.shape
            return build_unet(config, channels, size, text.config.hidden_size)

        task = DiffusionTask(
            config,
            build,
            latents,
            judged,
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
    """What `start` holds, by its lock: hashing all its weights takes long."""
    if start is None:
        return None
    lock = start / "lock.json"
    return digest(lock) if lock.is_file() else lock_directory(start).revision


@full_disk_named()
def train(options: TrainOptions, config: TrainConfig, report: Report) -> Path | None:
    """Train (or go on training) a backbone; returns the directory in diffusers' layout.

    None where stages behind those asked for are still to be trained.
    """
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        raise UsageError(f"no stage {sorted(unknown)[0]!r}", hint=f"stages: {', '.join(STAGES)}")
    disable_progress_bar()
    run = _Run(options, config, report)
    missing = run.missing()
    autoencoder = run.autoencoder()
    if "text" not in missing:
        text, tokenizer = run.text()
    if missing:
        if run.accelerator.is_main_process:
            LOG.info(
                "%s is no backbone yet: still missing: %s; train on with the same -o",
                options.out,
                ", ".join(missing),
            )
        return None
    unet = run.diffusion(autoencoder, text, tokenizer)
    if run.accelerator.is_main_process:
        export_backbone(
            options.out,
            autoencoder=autoencoder,
            text=text,
            tokenizer=tokenizer,
            unet=unet,
            licence=options.licence,
        )
    return options.out
