"""The switches of fast mode, as far as they change a backbone: each may change pixels."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from d3pack.backbones.autoencoder import open_autoencoder
from d3pack.errors import UsageError


def enable_fast_kernels(backbone: Any, switches: Collection[str], tiny_vae: Path | None) -> None:
    """Turn switches on in a backbone that nobody else uses."""
    if tiny_vae is not None:
        small = open_autoencoder(tiny_vae, device=backbone.device, dtype=backbone.dtype)
        if (small.channels, small.factor) != (
            backbone.autoencoder.channels,
            backbone.autoencoder.factor,
        ):
            raise UsageError(f"the autoencoder in {tiny_vae} has other latents")
        backbone.autoencoder = small
    if "channels_last" in switches:
        for model in (backbone.denoiser, backbone.autoencoder.model):
            model.to(memory_format=torch.channels_last)
    if "fused_attention" in switches:
        _fuse(backbone.denoiser)
    if "compile" in switches:
        # what is called, not the autoencoder around it: only a call runs what was compiled
        for part in (backbone.denoiser, backbone.autoencoder.model.decoder):
            part.compile(dynamic=False)


def _fuse(model: torch.nn.Module) -> None:
    """Queries, keys and values of self-attention from one product."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    for name, module in model.named_modules():
        if isinstance(module, Attention) and name.endswith("attn1"):
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())
