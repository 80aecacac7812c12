"""Timesteps are put on the device once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_dit, tiny_sd

from d3pack.backbones import open_backbone
from d3pack.backbones.levels import Timesteps


def test_timesteps_are_made_once_in_float32() -> None:
    timesteps = Timesteps(torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            found = timesteps(801.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.dtype, found.shape, float(found)) == (torch.float32, (), 801.5)
    assert not found.is_inference()
    assert timesteps(801.5) is found
    assert float(timesteps(0.0)) == 0.0


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_denoising_again_makes_no_new_timestep(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone: Any = open_backbone(str(make(tmp_path / "backbone")))
    x = torch.zeros(1, *backbone.latent_shape)
    nothing = backbone.unconditional()
    with torch.inference_mode():
        wanted = backbone.denoise(x, 1.5, nothing)
    made: list[Any] = []
    real = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    leaf = x.clone().requires_grad_()
    again = backbone.denoise(leaf, 1.5, nothing)  # with gradients, after a step without
    assert made == []
    torch.testing.assert_close(again.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.autograd.grad(again.sum(), leaf)
