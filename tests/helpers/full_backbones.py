"""Backbones of the published shapes with random half-size weights.

    path = full_sd(tmp_path / "sd")                # Stable Diffusion 1.5, 512 px, 2.1 GB
    path = full_dit(tmp_path / "dit")              # DiT-XL/2, 256 px, 1.5 GB
    path = full_denoiser("prx", tmp_path / "prx")  # also "sana-sprint", "sdxl", "flux2"

Scheduler and tokenizer are those of the tiny ones, and so is the text encoder of `full_denoiser`.
The shapes are those of diffusers' classes, or of published configs where those differ.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_dit, tiny_sd, tiny_sdxl
from tiny_flow import tiny_flow

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


VAE_XL: dict[str, Any] = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}
VAE_FLUX: dict[str, Any] = {
    **VAE_XL,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
VAE_FLUX_2: dict[str, Any] = {"_class_name": "AutoencoderKLFlux2"}
_DC_BLOCKS = [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3]
VAE_DC: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "decoder_block_types": _DC_BLOCKS,
    "downsample_block_type": "Conv",
    "encoder_block_types": _DC_BLOCKS,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}
PRX: dict[str, Any] = {"_class_name": "PRXTransformer2DModel"}
Z_IMAGE: dict[str, Any] = {"_class_name": "ZImageTransformer2DModel"}
KLEIN: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "guidance_embeds": False,
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
}
SPRINT: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
SPRINT_SMALL: dict[str, Any] = {
    **SPRINT,
    "cross_attention_dim": 1152,
    "cross_attention_head_dim": 72,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "num_layers": 28,
}
STEM = "diffusion_pytorch_model"
_SHARD = 1 << 31  # bytes


def model_of(config: dict[str, Any]) -> Any:
    """A model of diffusers or transformers with this config."""
    import diffusers
    import transformers

    if "architectures" in config:
        cls = getattr(transformers, config["architectures"][0])
        return cls(transformers.CLIPTextConfig(**config))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def put(root: Path, folder: str, stem: str, config: dict[str, Any]) -> int:
    """Random float16 weights of the shapes that a config asks for, in shards of at most 2 GiB;
    gives their number."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in model_of(config).state_dict().items()}
    shutil.rmtree(root / folder)
    (root / folder).mkdir()
    (root / folder / "config.json").write_text(json.dumps(config))
    # a prime number of values, so that the rows of a matrix differ
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).half()
    shards = list(_shards(shapes))
    for i, names in enumerate(shards, 1):
        end = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        state = {name: _values(name, shapes[name], block) for name in names}
        save_file(state, root / folder / f"{stem}{end}.safetensors")
    return sum(shape.numel() for shape in shapes.values())


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > _SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _values(name: str, shape: torch.Size, block: torch.Tensor) -> torch.Tensor:
    count = shape.numel()
    values: torch.Tensor = block.repeat(-(-count // len(block)))[:count].reshape(shape)
    if len(shape) > 1:  # outputs as large as inputs
        return values / math.sqrt(shape[1:].numel())
    is_positive = name.endswith((".weight", ".running_var"))  # of a norm
    return is_positive + 0.02 * values


def full_sd(root: Path) -> Path:
    tiny_sd(root)
    assert put(root, "unet", STEM, UNET) == 859_520_964
    assert put(root, "vae", STEM, VAE) == 83_653_863
    assert put(root, "text_encoder", "model", TEXT) == 123_060_480
    return root


def full_dit(root: Path) -> Path:
    tiny_dit(root)
    assert put(root, "transformer", STEM, DIT) > 675_000_000
    put(root, "vae", STEM, {**VAE, "sample_size": 256})
    return root


DENOISERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prx": (PRX, VAE_FLUX),
    "sana-sprint": (SPRINT_SMALL, VAE_DC),
    "sdxl": (UNET_XL, VAE_XL),
    "flux2": (KLEIN, VAE_FLUX_2),
}


def full_denoiser(kind: str, root: Path) -> Path:
    """A backbone whose denoiser and autoencoder have the published shapes, and the rest is tiny."""
    if kind == "sdxl":
        tiny_sdxl(root)
    else:
        tiny_flow(kind, root)
        side = {"default_sample_size": 256} if kind == "prx" else {}
        (root / "model_index.json").write_text(json.dumps(side))
    denoiser, vae = DENOISERS[kind]
    put(root, "unet" if kind == "sdxl" else "transformer", STEM, denoiser)
    put(root, "vae", STEM, vae)
    return root
