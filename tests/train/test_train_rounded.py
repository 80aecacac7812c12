"""A training that ends rounded: from which step on, what is measured, and the same when resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d3pack.backbones import Levels
from d3pack.train import (
    DIT_MODELS,
    SCHEDULE,
    ClassConditioner,
    DenoiserModule,
    DiffusionTask,
    Latents,
    accelerator_on,
    build_dit,
    in_four_bits,
    run_stage,
)
from d3pack.train.rounding import rounded

pytestmark = pytest.mark.heavy

STEPS = 16
LOOP = replace(DIT_MODELS["tiny"].loop, steps=STEPS, report_every=2)


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after every step would make one each."""
    monkeypatch.setattr(DiffusionTask, "preview", lambda *_: None)


def task(finish: float) -> DiffusionTask:
    """A tiny model on latents of noise; with finish, its last steps are rounded."""
    rng = np.random.default_rng(0)
    latents = Latents(
        rng.standard_normal((48, 4, 2, 2)).astype(np.float16), np.arange(48) % 3, np.zeros(48, bool)
    )
    config = replace(DIT_MODELS["tiny"], loop=LOOP)
    return DiffusionTask(
        config,
        lambda: build_dit(config, 4, 2, 3),
        latents,
        latents,
        ClassConditioner(3, 0.1),
        lambda z: z[:, :3],
        [0, 1, 2],
        0,
        Levels.from_config(SCHEDULE),
        finish,
    )


def trained(folder: Path, finish: float, stop: int = 0) -> tuple[Any, list[dict[str, Any]]]:
    """Return the average of a stage and its curve; a step to stop at interrupts it."""
    curve: list[dict[str, Any]] = []

    def report(entry: dict[str, Any]) -> None:
        curve.append(entry)
        if entry["step"] == stop:
            raise KeyboardInterrupt

    module = run_stage(
        task(finish),
        LOOP,
        folder,
        accelerator_on("cpu"),
        seconds=None,
        checkpoint_minutes=0.0,
        report=report,
    )
    return module, curve


def test_training_is_rounded_from_the_finish_on(tmp_path: Path) -> None:
    plain, before = trained(tmp_path / "plain", 0.0)
    module, curve = trained(tmp_path / "rounded", 0.25)
    losses, free = ([e["loss"] for e in c if "loss" in e] for c in (curve, before))
    assert losses[:6] == free[:6]  # 12 of 16 steps
    averages = [m.model.proj_out_1.weight for m in (plain, module)]
    assert not torch.equal(*averages)
    assert all("in_four" in task(0.25).batch(i, 0, 1, i / STEPS) for i in (12, 15))
    assert "in_four" not in task(0.25).batch(11, 0, 1, 11 / STEPS)
    assert "in_four" not in task(0.0).batch(15, 0, 1, 15 / STEPS)
    loss = curve[-1]["held_loss"]
    assert loss != task(0.0).validate(module)["held_loss"]
    assert isinstance(module, DenoiserModule)
    with torch.no_grad():
        for name, weight in module.model.named_parameters():
            if weight.ndim > 1 and in_four_bits(name):
                weight.copy_(rounded(weight))
    assert task(0.0).validate(module)["held_loss"] == loss


@pytest.mark.parametrize("stop", [8, 14])
def test_interrupted_finish_goes_on_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole, _ = trained(tmp_path / "whole", 0.25)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", 0.25, stop)
    resumed, curve = trained(tmp_path / "parts", 0.25)
    assert 1 < curve[0]["step"] <= stop + 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
