"""The training of `classcond`: a DiT in the latents of an autoencoder, and its directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from torch import Tensor

from d3pack.backbones import Autoencoder, Levels, lock_directory
from d3pack.encode.candidates import stored
from d3pack.encode.contract import EncodeRun
from d3pack.encode.methods.dit import WORK, encode_images, of_pixels
from d3pack.encode.sampler_search import STEPS
from d3pack.encode.settings import ClassCondSettings
from d3pack.format import Coded, coded_bytes, decode_files, encode_files
from d3pack.sources import Source
from d3pack.system import Events, Journal, mixed_precision, replace_folder, seconds_of
from d3pack.train import (
    SCHEDULE,
    VAE_FILES,
    ClassConditioner,
    DenoiserModule,
    DiffusionTask,
    DiTConfig,
    Latents,
    LoopConfig,
    accelerator_on,
    build_dit,
    export_dit,
    held_out_latents,
    in_four_bits,
    run_stage,
    write_lock,
)

TIME_SHARE = 0.93  # of the time to train for, that the steps are meant to take
TRIAL_STEPS = 24  # of the trial that measures how long one takes
PREVIEWS = 16  # classes on a sheet of samples
_NAMED = 120  # bytes: the name of a tensor and where it lies
# in the journal
_BACKBONE = f"{WORK}/backbone"
_TRAINED = f"{WORK}/trained"


@dataclass(frozen=True, slots=True)
class Trained:
    """A backbone's directory, and what led to it."""

    folder: Path
    steps: int
    samples: int
    validation_loss: float


def trained_dit(
    run: EncodeRun,
    config: DiTConfig,
    vae: Autoencoder,
    vae_folder: Path,
    side: int,
    own: ClassCondSettings,
) -> Trained:
    """Return the backbone, trained now or before; of several shards, one does it for all."""
    journal = run.journal
    if run.once("train the diffusion model", _TRAINED):
        steps, loss = _train(run, config, vae, vae_folder, side, own)
        facts = {"steps": steps, "samples": steps * config.loop.batch, "validation_loss": loss}
        journal.save(_TRAINED, {}, facts)
    folder = journal.find(_BACKBONE)
    assert folder is not None
    return Trained(folder, **stored(journal, _TRAINED)[1])


def _train(
    run: EncodeRun,
    config: DiTConfig,
    vae: Autoencoder,
    vae_folder: Path,
    side: int,
    own: ClassCondSettings,
) -> tuple[int, float]:
    """Train, from the last checkpoint on, and write the directory; return steps and loss."""
    work = run.journal.path(WORK)
    if not (work / "vae").exists():  # what makes the latents is what goes into the backbone
        _copy_autoencoder(vae_folder, work / "vae")

    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(run.context.device))

    photos, latents = encode_images(run, encode, side, config.hold_back)
    validation = held_out_latents(photos, of_pixels(encode))
    if own.embed_bits == 8:
        config = replace(config, finish=0.0)
    task = _task(config, vae, latents, validation, len(photos.names), run.settings.seed)
    accelerator = accelerator_on(run.context.device)
    loop = replace(config.loop, steps=own.train_steps or config.loop.steps)
    if own.train_seconds:
        if "train steps" not in run.journal:
            with run.events.stage("measure the speed", TRIAL_STEPS, "steps"):
                speed = _samples_per_second(task, loop, work / "trial", accelerator, run.events)
            samples = loop.batch * int(accelerator.num_processes)
            steps = max(1, math.floor(TIME_SHARE * own.train_seconds * speed / samples))
            run.journal.record("train steps", steps)
        loop = replace(loop, steps=run.journal["train steps"])
    with run.events.stage("train the diffusion model", loop.steps, "steps", part="train"):
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
    folder = run.journal.path(_BACKBONE)
    if not (folder / "lock.json").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        export_dit(folder, module.model, work / "vae", run.source.classes, own.licence)
    return loop.steps, _validation_loss(work / task.name)


def _task(
    config: DiTConfig,
    vae: Autoencoder,
    latents: Latents,
    validation: Latents,
    classes: int,
    seed: int,
) -> DiffusionTask:
    _, channels, side, _ = latents.values.shape
    previews = min(classes, PREVIEWS)

    def build() -> DiTTransformer2DModel:
        return build_dit(config, channels, side, classes)

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        return torch.cat([vae.decode_float(p.float()) for p in torch.split(z, 32)])

    return DiffusionTask(
        config,
        build,
        latents,
        validation,
        ClassConditioner(classes, config.drop),
        decode,
        [i * classes // previews for i in range(previews)] * 4,
        seed,
        Levels.from_config(SCHEDULE),
        config.finish,
    )


def _copy_autoencoder(folder: Path, to: Path) -> None:
    """Copy the files of an autoencoder, all or none."""
    with replace_folder(to) as temporary:
        for name in VAE_FILES:
            shutil.copyfile(folder / name, temporary / name)


def _reporter(run: EncodeRun) -> Callable[[dict[str, Any]], None]:
    def report(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            facts = {k: entry[k] for k in ("loss", "samples", "held_loss") if k in entry}
            run.events.step(entry["step"], **facts)
            run.journal.send()  # the last checkpoint

    return report


def _samples_per_second(
    task: DiffusionTask, loop: LoopConfig, folder: Path, accelerator: Accelerator, events: Events
) -> float:
    """Return the speed of a short trial. A clock would end each run at another step."""
    shutil.rmtree(folder, ignore_errors=True)
    speeds: list[float] = []

    def report(entry: dict[str, Any]) -> None:
        if "samples_per_s" in entry:
            speeds.append(entry["samples_per_s"])
            events.step(entry["step"])

    short = replace(loop, steps=TRIAL_STEPS, report_every=TRIAL_STEPS // 4, validate_every=10**9)
    run_stage(
        task, short, folder, accelerator, seconds=None, checkpoint_minutes=60.0, report=report
    )
    shutil.rmtree(folder)
    return float(np.median(speeds[1:]))  # the first ones pay for allocations


def _validation_loss(folder: Path) -> float:
    last = (folder / "curve.jsonl").read_text().splitlines()[-1]
    return float(f"{json.loads(last)['held_loss']:.5g}")


def embed(journal: Journal, trained: Path, bits: int) -> tuple[Path, Coded]:
    """Return a backbone as a pack carries it, and the directory that it becomes again.

    Its weights have eight bits, most of the model's as many as are asked for: images must be made
    with what they become.
    """
    ref = lock_directory(trained)
    files = {path: (trained / path).read_bytes() for path in ref.files}

    def in_four(path: str, name: str) -> bool:
        return bits == 4 and path.startswith("transformer/") and in_four_bits(name)

    coded = encode_files(files, in_four)
    folder = journal.path(f"{WORK}/embedded")
    for path, data in decode_files(coded).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    licence = json.loads((trained / "lock.json").read_text())["licence"]
    write_lock(folder, licence)
    return folder, coded


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds on this machine."""

    read_and_encode: float  # of a real image, with its mirror image
    train: float  # of a sample
    forward: float  # of the model
    image: float  # of a generated one, with the middle sampling of the search


def measure_costs(
    source: Source, config: DiTConfig, vae: Autoencoder, side: int, classes: int
) -> Costs:
    """Measure a little of every stage on this machine."""
    latent_side, few = side // vae.factor, min(8, source.counts[0])
    device = next(vae.model.parameters()).device
    module = DenoiserModule(
        build_dit(config, vae.channels, latent_side, classes), Levels.from_config(SCHEDULE)
    ).to(device)
    x = torch.zeros((16, vae.channels, latent_side, latent_side), device=device)
    labels = torch.zeros(16, dtype=torch.long, device=device)
    times = torch.full((16,), 500, device=device)

    def train() -> None:
        with mixed_precision(device):
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
        forward=forward,
        image=decode + steps * guided * forward,
    )


def dit_bytes(config: DiTConfig, channels: int, latent_side: int, classes: int, bits: int) -> int:
    """Return about the bytes of a model of this size in a pack, with so many bits a weight."""
    with torch.device("meta"):
        model = build_dit(config, channels, latent_side, classes)
    weights = sum(
        coded_bytes(value.shape, bits if in_four_bits(name) else 8)
        for name, value in model.named_parameters()
    )
    return weights + _NAMED * len(model.state_dict())
