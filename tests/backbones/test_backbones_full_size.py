"""Stable Diffusion 1.5 at 512 px and DiT-XL/2 at 256 px, random half-size weights: minutes, 4 GB.

The shapes are those of the published configs; they go through the code that opens everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_backbones import full_dit, full_sd

from d3pack.backbones import lock_directory, open_backbone
from d3pack.decode import samplers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "latent", "prompt"),
    [(full_sd, (4, 64, 64), (75, 768)), (full_dit, (4, 32, 32), (1, 1152))],
)
def test_full_size_models_have_their_shapes(
    make: Callable[[Path], Path],
    latent: tuple[int, ...],
    prompt: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    ref = lock_directory(make(tmp_path / "full"))
    dtype = torch.bfloat16
    backbone = open_backbone(ref, path=tmp_path / "full", dtype=dtype)
    assert (backbone.latent_shape, backbone.prompt_shape) == (latent, prompt)
    with torch.no_grad():
        vectors = torch.randn(1, 1, prompt[1]) * 0.02
        c = backbone.condition(vectors)
        sigma = samplers.schedule(backbone.levels.alphas_cumprod, "ddim", 1)[0]
        x0 = backbone.denoise(samplers.start(torch.randn(1, *latent), (sigma,)), sigma, c)
        assert x0.shape == (1, *latent)
        assert torch.isfinite(x0).all()
        images = backbone.decode(x0)
    assert images.shape == (1, 3, 8 * latent[1], 8 * latent[2])
    assert images.dtype == torch.uint8


def test_sdxl_has_its_published_parameters() -> None:
    """On the meta device: without weights, which would take 14 GB."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from full_backbones import TEXT, TEXT_2, UNET_XL, VAE
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from d3pack.backbones.loading import check_config
    from d3pack.backbones.sdxl import _pooled_width

    for config in (UNET_XL, TEXT_2, VAE):
        check_config("config.json", config)
    assert _pooled_width(UNET_XL) == 1280 == TEXT_2["projection_dim"]
    assert TEXT["hidden_size"] + TEXT_2["hidden_size"] == UNET_XL["cross_attention_dim"] == 2048
    bare = [{k: v for k, v in c.items() if k[0] != "_"} for c in (UNET_XL, VAE, TEXT, TEXT_2)]
    with torch.device("meta"):
        models = (
            UNet2DConditionModel(**bare[0]),
            AutoencoderKL(**bare[1]),
            CLIPTextModel(CLIPTextConfig(**bare[2])),
            CLIPTextModelWithProjection(CLIPTextConfig(**bare[3])),
        )
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    x, states = torch.empty(1, 4, 128, 128, device="meta"), torch.empty(1, 3, 2048, device="meta")
    added = {
        "text_embeds": torch.empty(1, 1280, device="meta"),
        "time_ids": torch.empty(1, 6, device="meta"),
    }
    t = torch.empty(1, device="meta")
    out = models[0](x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
    assert out.shape == x.shape
