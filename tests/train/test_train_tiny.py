"""`d3pack train` end to end with the tiny preset: trained, killed, resumed, exported, opened."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from d3pack.backbones import open_backbone
from d3pack.errors import NotFoundError, UsageError
from d3pack.train import TrainSettings, train_backbone
from d3pack.train.config import PRESETS, LoopConfig, TrainConfig
from d3pack.train.data import batch_rows, split
from d3pack.train.loop import accelerator_on, learning_rate
from d3pack.train.muon import orthogonalised
from d3pack.train.text import TextModule, TextTask

pytestmark = pytest.mark.heavy

CLASSES = {"red_ball": (220, 40, 40), "green_field": (40, 200, 60), "deep sea": (30, 60, 210)}


class Killed(BaseException):
    """Stands for a signal: nothing in the trainer may catch it."""


def silent(event: dict[str, Any]) -> None:
    """Ignore an event."""


def train(
    photos: Path,
    output: Path,
    config: TrainConfig,
    report: Callable[[dict[str, Any]], None],
    **settings: Any,
) -> Path | None:
    settings = {"device": "cpu", **settings}
    return train_backbone(photos, output, TrainSettings(**settings), config=config, report=report)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy colours, 40 x 32 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir()
        for i in range(12):
            pixels = np.asarray(colour) + rng.integers(-30, 31, (32, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


def config(**loop: Any) -> TrainConfig:
    """The tiny preset, reporting every fifth step."""
    tiny = PRESETS["tiny"]
    every = {"report_every": 5, "validate_every": 10, **loop}
    return replace(
        tiny,
        autoencoder=replace(tiny.autoencoder, loop=replace(tiny.autoencoder.loop, **every)),
        text=replace(tiny.text, loop=replace(tiny.text.loop, **every)),
        diffusion=replace(tiny.diffusion, loop=replace(tiny.diffusion.loop, **every)),
    )


def test_accelerator_is_on_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str | None] = []

    def second(name: str | None) -> torch.device:
        named.append(name)
        return torch.device("cuda", 1)

    monkeypatch.setattr("d3pack.train.loop.resolve_device", second)
    AcceleratorState._reset_state(True)
    try:
        assert accelerator_on("cuda:1").device == torch.device("cuda", 1)
        assert named == ["cuda:1"]
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "no")])
def test_products_are_bfloat16_only_where_that_is_not_slower(
    monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr("d3pack.train.loop.fast_bfloat16", lambda device: fast)
    monkeypatch.setattr("d3pack.train.muon.fast_bfloat16", lambda device: fast)
    AcceleratorState._reset_state(True)
    try:
        assert accelerator_on("cpu").mixed_precision == precision
    finally:
        AcceleratorState._reset_state(True)
    matrix = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    step = orthogonalised(matrix)
    assert step.dtype == (torch.bfloat16 if fast else torch.float32)
    values = torch.linalg.svdvals(step.float())
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "backbone"
    assert train(photos, out, config(), silent) == out
    return out


def curve(out: Path, stage: str) -> dict[int, float]:
    """Loss by step; what a resumed run repeats must agree with what was there."""
    losses: dict[int, float] = {}
    for line in (out / "training" / stage / "curve.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            losses[entry["step"]] = entry["loss"]
    return losses


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    with safe_open(path, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def test_every_stage_learns(trained: Path) -> None:
    for stage in ("autoencoder", "text", "diffusion"):
        losses = curve(trained, stage)
        assert losses[max(losses)] < 0.8 * losses[5], stage


def test_the_backbone_opens_and_makes_images(trained: Path) -> None:
    backbone = open_backbone(str(trained))
    assert backbone.latent_shape == (4, 4, 4)
    vectors = backbone.name_vectors("red_ball", 2)[None]
    c = backbone.condition(vectors)
    x = backbone.denoise(torch.zeros(1, *backbone.latent_shape), 10.0, c)
    images = backbone.decode(x)
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, 32, 32)


def test_the_export_is_half_precision_and_locked(trained: Path) -> None:
    from d3pack.backbones import lock_directory

    for part in ("unet", "vae", "text_encoder"):
        (path,) = (trained / part).glob("*.safetensors")
        assert {t.dtype for t in weights(path).values()} == {torch.float16}
    lock = json.loads((trained / "lock.json").read_text())
    found = lock_directory(trained)
    assert found.kind == lock["kind"]
    for path_, file in found.files.items():
        assert lock["files"][path_] == [file.size, file.sha256]
    text = "".join(p.read_text() for p in trained.glob("*/*.json"))
    assert str(trained.parent) not in text


def test_the_tokenizer_is_written_as_it_was_made(trained: Path) -> None:
    written = json.loads((trained / "tokenizer" / "tokenizer.json").read_text())
    assert written["padding"] is None
    assert written["truncation"] is None


def test_diffusers_own_pipeline_loads_it(trained: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(trained, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a photo of a red ball", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 32, 32, 3)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "stage", [pytest.param("autoencoder", marks=pytest.mark.slow), "diffusion"]
)
def test_a_killed_run_resumes_to_the_same_curve(
    photos: Path, trained: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "backbone"

    def kill(event: dict[str, Any]) -> None:
        if event["stage"] == stage and event["step"] == 20:
            raise Killed

    output, settings = out, dict[str, Any]()
    often = replace(config(), checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        train(photos, output, often, kill, **settings)
    resumed_at: list[int] = []

    def hear(event: dict[str, Any]) -> None:
        if event["stage"] == stage and not event.get("final"):
            resumed_at.append(event["step"])

    train(photos, output, often, hear, **settings)
    assert resumed_at[0] > 5  # it went on, it did not start again
    assert curve(out, stage) == curve(trained, stage)
    mine = weights(out / "unet" / "diffusion_pytorch_model.safetensors")
    theirs = weights(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.heavy
def test_training_goes_on_from_existing_weights(
    photos: Path, trained: Path, tmp_path: Path
) -> None:
    out = train(
        photos, tmp_path / "next", config(), silent, init_from=str(trained), stages=("diffusion",)
    )
    assert out is not None
    before, after = curve(trained, "diffusion"), curve(out, "diffusion")
    assert after[5] < before[5]
    same = "vae/diffusion_pytorch_model.safetensors"
    assert (out / same).read_bytes() == (trained / same).read_bytes()


def test_the_text_encoder_goes_on_from_existing_weights(photos: Path, trained: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(trained / "tokenizer")
    task = TextTask(config().text, tokenizer, ["ball"], np.ones((1, 4), np.float32), 1, 0, trained)
    module = task.module()
    assert isinstance(module, TextModule)
    stored = weights(trained / "text_encoder" / "model.safetensors")
    for name, value in module.model.state_dict().items():
        if name in stored:
            assert torch.equal(value, stored[name].float()), name


@pytest.mark.heavy
def test_words_keep_their_tokens_when_training_goes_on(
    photos: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "next"
    output, settings = out, dict[str, Any](init_from=str(trained), stages=("text", "diffusion"))
    train(photos, output, config(steps=10), silent, **settings)
    same = "tokenizer/tokenizer.json"
    assert (out / same).read_bytes() == (trained / same).read_bytes()
    model = "text_encoder/model.safetensors"
    assert (out / model).read_bytes() != (trained / model).read_bytes()


def test_a_time_budget_is_for_the_stages_asked_for(
    photos: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "next"
    output, settings = (
        out,
        dict[str, Any](time_budget=3.0, init_from=str(trained), stages=("diffusion",)),
    )
    train(photos, output, config(steps=10**6), silent, **settings)
    lines = (out / "training" / "diffusion" / "curve.jsonl").read_text().splitlines()
    assert 2.4 < max(json.loads(line).get("seconds", 0.0) for line in lines) < 4.0


def test_a_time_budget_ends_a_run_with_its_rate_fallen(photos: Path, tmp_path: Path) -> None:
    output, settings = tmp_path / "b", dict[str, Any](time_budget=4.0)
    train(photos, output, config(steps=10**6), silent, **settings)
    for stage in ("autoencoder", "text", "diffusion"):
        lines = (tmp_path / "b" / "training" / stage / "curve.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["final"]


def test_other_settings_are_refused(photos: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="other settings"):
        train(photos, trained, replace(config(), seed=5), silent)


def test_what_else_a_run_was_started_with_is_held_to(
    photos: Path, trained: Path, tmp_path: Path
) -> None:
    words, encoder = tmp_path / "words.txt", tmp_path / "encoder"
    words.write_text("tiger\nlion\n")
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    for name, value in (
        ("init_from", str(trained)),
        ("words", words),
        ("sentence_encoder", encoder),
    ):
        with pytest.raises(UsageError, match=rf"other settings \({name}\)"):
            train(photos, trained, config(), silent, **{name: value})
    with pytest.raises(NotFoundError, match=r"there is no .*gone\.txt"):
        train(photos, trained, config(), silent, words=tmp_path / "gone.txt")


def test_a_run_goes_on_with_the_words_it_was_started_with(photos: Path, tmp_path: Path) -> None:
    words, out = tmp_path / "words.txt", tmp_path / "b"
    words.write_text("tiger\nlion\n")
    output, settings = out, dict[str, Any](stages=("text",), words=words)
    for _ in range(2):  # the second time the settings are there, and the same
        with pytest.raises(UsageError, match="never trained"):
            train(photos, output, config(), silent, **settings)
    words.write_text("car\nbus\n")
    with pytest.raises(UsageError, match="other settings"):
        train(photos, output, config(), silent, **settings)


def test_a_folder_of_an_earlier_version_goes_on(photos: Path, trained: Path) -> None:
    path = trained / "training" / "settings.json"
    text = path.read_text()
    found = json.loads(text)
    path.write_text(json.dumps({key: found[key] for key in ("source", "config")}))
    train(photos, trained, config(), silent)
    assert path.read_text() == text


def test_first_stages_alone_end_well(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "d3pack")
    out, short = tmp_path / "b", config(steps=10)
    for stages, missing in (
        (("autoencoder",), "text, diffusion"),
        (("autoencoder", "text"), "diffusion"),
        (("autoencoder",), "diffusion"),
    ):
        caplog.clear()
        output, settings = out, dict[str, Any](stages=stages)
        assert train(photos, output, short, silent, **settings) is None
        assert f"{out} is not a backbone yet: still missing: {missing}; train" in caplog.text
        assert not (out / "lock.json").exists()
    output, settings = out, dict[str, Any](stages=("diffusion",))
    assert train(photos, output, short, silent, **settings) == out
    assert (out / "lock.json").exists()


def test_a_stage_that_was_never_trained_is_named(photos: Path, tmp_path: Path) -> None:
    output, settings = tmp_path / "b", dict[str, Any](stages=("text",))
    with pytest.raises(UsageError, match="'autoencoder' was never trained"):
        train(photos, output, config(), silent, **settings)


@pytest.mark.slow
def test_two_processes_train_one_model(photos: Path, tmp_path: Path) -> None:
    """The command as it runs on two GPUs, here on two processes of the CPU, with a time budget."""
    out = tmp_path / "backbone"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["d3pack", "train", str(photos), "-o", str(out), "--preset", "tiny"]
    command += ["--time-budget", "60s", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("use it as --backbone") == 1
    for stage in ("autoencoder", "text", "diffusion"):
        entry = json.loads((out / "training" / stage / "curve.jsonl").read_text().splitlines()[0])
        assert entry["samples"] == 2 * 16 * entry["step"]
    losses = curve(out, "autoencoder")
    assert losses[max(losses)] < losses[10]
    assert open_backbone(str(out)).image_size == (32, 32)


def test_held_back_images_are_the_last_of_each_class() -> None:
    labels = np.repeat([0, 1], [10, 6])
    train_rows, held = split(labels, 2)
    assert held.tolist() == [8, 9, 14, 15]
    assert sorted([*train_rows, *held]) == list(range(16))


def test_an_epoch_shows_every_row_once() -> None:
    seen = np.concatenate([batch_rows(30, 8, step, seed=1) for step in range(15)])
    for epoch in range(4):
        assert sorted(seen[epoch * 30 : (epoch + 1) * 30]) == list(range(30))
    assert (batch_rows(30, 8, 3, seed=1) == seen[24:32]).all()


def test_the_rate_rises_holds_and_falls() -> None:
    loop = LoopConfig(batch=1, lr=1.0, steps=100, share=1.0, warmup=10, decay=0.2)
    rates = [learning_rate(loop, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
