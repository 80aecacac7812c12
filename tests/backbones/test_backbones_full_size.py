"""Stable Diffusion 1.5 at 512 px and DiT-XL/2 at 256 px, random half-size weights: minutes, 4 GB.

The shapes are those of the published configs; they go through the code that opens everything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_dit, tiny_sd

from d3pack import samplers
from d3pack.backbones import lock_directory, open_backbone

pytestmark = pytest.mark.slow

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
}


def put(root: Path, folder: str, stem: str, config: dict[str, Any], cls: Any) -> int:
    """Random float16 weights of the shapes that a config asks for; gives their number."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig

    with init_empty_weights(include_buffers=False):
        bare = {k: v for k, v in config.items() if k not in ("_class_name", "architectures")}
        model = cls(CLIPTextConfig(**bare)) if "architectures" in config else cls(**bare)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(p.shape, generator=generator) * 0.02).half()
        for name, p in model.state_dict().items()
    }
    (root / folder / "config.json").write_text(json.dumps(config))
    save_file(state, root / folder / f"{stem}.safetensors")
    return sum(p.numel() for p in state.values())


def full_sd(root: Path) -> Path:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    tiny_sd(root)
    stem = "diffusion_pytorch_model"
    assert put(root, "unet", stem, UNET, UNet2DConditionModel) == 859_520_964
    assert put(root, "vae", stem, VAE, AutoencoderKL) == 83_653_863
    assert put(root, "text_encoder", "model", TEXT, CLIPTextModel) == 123_060_480
    return root


def full_dit(root: Path) -> Path:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    tiny_dit(root)
    stem = "diffusion_pytorch_model"
    assert put(root, "transformer", stem, DIT, DiTTransformer2DModel) > 675_000_000
    put(root, "vae", stem, {**VAE, "sample_size": 256}, AutoencoderKL)
    return root


@pytest.mark.parametrize(
    ("make", "latent", "prompt"),
    [(full_sd, (4, 64, 64), (75, 768)), (full_dit, (4, 32, 32), (1, 1152))],
)
def test_full_size_shapes(
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
