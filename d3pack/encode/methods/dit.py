"""The training behind `--method classcond`: images, latents, a DiT and its directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from torch import Tensor

from d3pack.backbones import Backbone, lock_directory
from d3pack.backbones.autoencoder import Autoencoder
from d3pack.backbones.levels import Levels
from d3pack.encode import skipped
from d3pack.encode.complete import Told
from d3pack.encode.estimate import seconds_of
from d3pack.encode.generate import SHOWN
from d3pack.encode.method import Run
from d3pack.encode.search import STEPS, search, with_setting
from d3pack.format.codecs import decode_files, encode_files
from d3pack.format.coded import Coded
from d3pack.format.pack import Pack
from d3pack.sources import Source
from d3pack.system.events import Events
from d3pack.system.journal import Journal
from d3pack.teachers import Teacher
from d3pack.train.config import LoopConfig
from d3pack.train.data import Latents, Photos, cached_latents, load_photos
from d3pack.train.diffusion import SCHEDULE, DenoiserModule, DiffusionTask
from d3pack.train.dit import VAE_FILES, ClassConditioner, DiTConfig, build_dit, export_dit
from d3pack.train.export import write_lock
from d3pack.train.loop import run_stage

Pixels = npt.NDArray[np.uint8]
WORK = "training"
CAREFUL = 0.93  # share of a time budget that the steps are meant to take: machines grow busy
TRIED = 24  # steps of the trial that tells how long one takes


class Length(Protocol):
    """How long to train, and under which licence the outcome stands."""

    @property
    def train_steps(self) -> int: ...

    @property
    def train_seconds(self) -> float: ...

    @property
    def licence(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Trained:
    """A backbone's directory, and what led to it."""

    folder: Path
    photos: Photos
    steps: int
    samples: int
    held_loss: float


def train_dit(
    run: Run, config: DiTConfig, vae: Autoencoder, vae_folder: Path, side: int, length: Length
) -> Trained:
    """Train (or go on training) and write the directory; done once."""
    seed, work = run.options.seed, run.journal.path(WORK)
    if not (work / "vae").exists():  # what latents were made with is what goes into the backbone
        _copied(vae_folder, work / "vae")

    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(run.device))

    photos, latents = encoded(run, encode, side, config.hold_back)
    judged = _held(encode, photos)
    _, channels, latent_side, _ = latents.values.shape
    classes = len(photos.names)
    shown = min(classes, 16)

    def build() -> DiTTransformer2DModel:
        return build_dit(config, channels, latent_side, classes)

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        return torch.cat([vae.decode_float(p.float()) for p in torch.split(z, 32)])

    task = DiffusionTask(
        config,
        build,
        latents,
        judged,
        ClassConditioner(classes, config.drop),
        decode,
        [i * classes // shown for i in range(shown)] * 4,
        seed,
        Levels.from_config(SCHEDULE),
    )
    accelerator = Accelerator(cpu=run.device.startswith("cpu"), mixed_precision="bf16")
    loop = replace(config.loop, steps=length.train_steps or config.loop.steps)
    if length.train_seconds:
        if "train steps" not in run.journal:
            with run.events.stage("measure the speed", TRIED, "steps"):
                steps = _steps_in(
                    length.train_seconds, task, loop, work / "trial", accelerator, run.events
                )
            run.journal.record("train steps", steps)
        loop = replace(loop, steps=run.journal["train steps"])
    with run.events.stage("train the diffusion model", loop.steps, "steps"):
        module = run_stage(
            task,
            loop,
            work / task.name,
            accelerator,
            seconds=None,
            checkpoint_minutes=config.checkpoint_minutes,
            report=_reporter(run),
        )
    assert isinstance(module, DenoiserModule)
    assert isinstance(module.model, DiTTransformer2DModel)
    folder = run.journal.path(f"{WORK}/backbone")
    if not (folder / "lock.json").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        export_dit(folder, module.model, work / "vae", run.source.classes, length.licence)
    return Trained(
        folder, photos, loop.steps, loop.steps * loop.batch, _held_loss(work / task.name)
    )


@dataclass(frozen=True, slots=True)
class Carried:
    """A backbone as a pack carries it, and the directory that it becomes again."""

    folder: Path
    coded: Coded


def carry(journal: Journal, trained: Path) -> Carried:
    """Weights in eight bits: from here on, images are made with what they became."""
    ref = lock_directory(trained)
    coded = encode_files({path: (trained / path).read_bytes() for path in ref.files})
    folder = journal.path(f"{WORK}/embedded")
    for path, data in decode_files(coded).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    licence = json.loads((trained / "lock.json").read_text())["licence"]
    write_lock(folder, licence)
    return Carried(folder, coded)


def encoded(
    run: Run, encode: Callable[[Tensor], Tensor], side: int, hold_back: int
) -> tuple[Photos, Latents]:
    """All images at one size, and the latents of those to train on. Made once."""
    cache = run.journal.path(WORK) / "cache"
    with run.events.stage("read the images", sum(run.source.counts), "images"):
        if "images" not in run.journal:  # files that were left out are not in the journal either
            (cache / "photos.json").unlink(missing_ok=True)
        photos = load_photos(run.source, cache, side, hold_back, _every(100, run.events.step))
        skipped.remember(run.journal, run.source)
        run.journal.record("images", len(photos.labels))  # a journal of no facts has not begun
    with run.events.stage("encode the images", 2 * len(photos.train), "images"):
        latents = cached_latents(
            photos, _of_pixels(encode), cache, 0.0, run.options.seed, _every(256, run.events.step)
        )
    return photos, latents


def _held(encode: Callable[[Tensor], Tensor], photos: Photos) -> Latents:
    through = _of_pixels(encode)
    parts = np.array_split(photos.held_out, max(1, len(photos.held_out) // 256))
    held = np.concatenate([through(photos.pixels[rows]).half().cpu().numpy() for rows in parts])
    return Latents(held, photos.labels[photos.held_out], np.zeros(len(held), np.bool_))


def _of_pixels(encode: Callable[[Tensor], Tensor]) -> Callable[[Pixels], Tensor]:
    """An encoder of images as one of (N, S, S, 3) pixels."""

    @torch.no_grad()
    def through(pixels: Pixels) -> Tensor:
        return encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    return through


def photos_of(photos: Photos, c: int, most: int) -> Pixels:
    """Evenly spread images of a class, (N, 3, S, S)."""
    rows = np.flatnonzero(photos.labels == c)
    picked = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
    return np.ascontiguousarray(photos.pixels[picked].transpose(0, 3, 1, 2))


class Wanted(Protocol):
    """How the sampler is to be chosen."""

    @property
    def search_images(self) -> int: ...

    @property
    def decode_seconds(self) -> float: ...


def best_sampled(
    run: Run, pack: Pack, backbone: Backbone, teacher: Teacher, photos: Photos, wanted: Wanted
) -> tuple[Pack, dict[str, float]]:
    """The pack with the sampler that makes it most like its real images, and how like it is."""
    each = max(4, wanted.search_images // len(pack.classes))
    best = search(
        pack,
        backbone,
        teacher,
        lambda c: photos_of(photos, c, 4 * each),
        run.options,
        run.journal,
        run.events,
        images=wanted.search_images,
        decode_seconds=wanted.decode_seconds,
    )
    figures = {"right": best.right, "distance": best.distance}
    return with_setting(pack, backbone, best.setting), figures


def told(method: str, metrics: Mapping[str, Any], photos: Photos, images: int) -> Told:
    """What the pack says of a training on `photos`, the readable ones of `images`."""
    return Told(
        method,
        metrics,
        seen=len(photos.labels),
        bad=images - len(photos.labels),
        shown=lambda c: photos_of(photos, c, SHOWN),
        title="Real images, and what the pack makes",
    )


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds on this machine."""

    read_and_encode: float  # of a real image, with its mirror image
    train: float  # of a sample
    image: float  # of one made, with the middle setting of the sampler


def dit_costs(
    source: Source, config: DiTConfig, vae: Autoencoder, side: int, classes: int
) -> Costs:
    """A little of everything, measured."""
    latent_side, few = side // vae.factor, min(8, source.counts[0])
    device = next(vae.model.parameters()).device
    module = DenoiserModule(
        build_dit(config, vae.channels, latent_side, classes), Levels.from_config(SCHEDULE)
    ).to(device)
    x = torch.zeros((16, vae.channels, latent_side, latent_side), device=device)
    labels = torch.zeros(16, dtype=torch.long, device=device)
    times = torch.full((16,), 500, device=device)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = module(x, torch.zeros_like(x), times, class_labels=labels)["loss"]
        torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])

    with torch.no_grad():
        pixels = torch.zeros((16, 3, side, side), dtype=torch.uint8, device=device)
        encode = seconds_of(lambda: vae.encode(pixels)) / 16
        decode = seconds_of(lambda: vae.decode_float(x)) / 16
        forward = seconds_of(lambda: module.model(x, times, class_labels=labels)) / 16
    read = seconds_of(lambda: [source.get(0, i) for i in range(few)]) / few
    steps, guided = STEPS[len(STEPS) // 2], 2
    return Costs(
        read_and_encode=read + 2 * encode,
        train=seconds_of(train) / 16,
        image=decode + steps * guided * forward,
    )


def dit_weights(config: DiTConfig, channels: int, latent_side: int, classes: int) -> int:
    """Values in the file of a model of this size."""
    with torch.device("meta"):
        model = build_dit(config, channels, latent_side, classes)
    return sum(value.numel() for value in model.state_dict().values())


def _copied(folder: Path, to: Path) -> None:
    """The files of an autoencoder, all or none."""
    part = to.with_name(to.name + "-part")  # .part is for files, and the journal removes them
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in VAE_FILES:
        shutil.copyfile(folder / name, part / name)
    part.rename(to)


def _every(many: int, tell: Callable[..., None]) -> Callable[[int, int], None]:
    told = 0

    def listen(done: int, total: int) -> None:
        nonlocal told
        if done - told >= many or done == total:
            told = done
            tell(done)

    return listen


def _reporter(run: Run) -> Callable[[dict[str, Any]], None]:
    def report(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            facts = {k: entry[k] for k in ("loss", "samples", "held_loss") if k in entry}
            run.events.step(entry["step"], **facts)

    return report


def _steps_in(
    seconds: float,
    task: DiffusionTask,
    loop: LoopConfig,
    folder: Path,
    accelerator: Accelerator,
    events: Events,
) -> int:
    """How many steps a time holds: a trial run tells. A clock would end each run elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
    speeds: list[float] = []

    def report(entry: dict[str, Any]) -> None:
        if "samples_per_s" in entry:
            speeds.append(entry["samples_per_s"])
            events.step(entry["step"])

    short = replace(loop, steps=TRIED, report_every=TRIED // 4, validate_every=10**9)
    run_stage(
        task, short, folder, accelerator, seconds=None, checkpoint_minutes=60.0, report=report
    )
    shutil.rmtree(folder)
    speed = float(np.median(speeds[1:]))  # the first ones pay for allocations
    samples = loop.batch * int(accelerator.num_processes)
    return max(1, math.floor(CAREFUL * seconds * speed / samples))


def _held_loss(folder: Path) -> float:
    last = (folder / "curve.jsonl").read_text().splitlines()[-1]
    return float(f"{json.loads(last)['held_loss']:.5g}")
