"""Backbones of the published shapes with random half-size weights: Stable Diffusion 1.5, DiT-XL/2.

    path = full_sd(tmp_path / "sd")      # 512 px, 2.1 GB
    path = full_dit(tmp_path / "dit")    # 256 px, 1.5 GB

Scheduler and tokenizer are those of the tiny ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_dit, tiny_sd

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
UNET_XL: dict[str, Any] = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "use_linear_projection": True,
}
TEXT_2: dict[str, Any] = {
    **TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
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
