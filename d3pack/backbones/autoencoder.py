"""Between latents and pixels, for both kinds of autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.backbones.cpu import like_weights
from d3pack.backbones.loading import Files, build, number
from d3pack.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KINDS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder:
    """Latents carry the diffusion model's scale: the config's scaling and shift live here."""

    def __init__(self, files: Files, *, device: torch.device, dtype: torch.dtype) -> None:
        stem = "diffusion_pytorch_model"
        self.model = build(files, "vae", stem, KINDS, device=device, dtype=dtype)
        config = self.model.config
        self.channels = int(config.latent_channels)
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        self.factor = 2 ** (len(blocks) - 1)
        self._scale = number("vae/config.json", config, "scaling_factor", 1.0)
        self._shift = number("vae/config.json", config, "shift_factor", 0.0)
        if self._scale == 0:
            raise BackboneError("vae/config.json: scaling_factor is 0", code="E_BACKBONE_CONFIG")
        self._dtype = dtype

    def encode(self, images: Tensor) -> Tensor:
        """uint8 or [-1, 1] float images (B, 3, H, W) -> float32 latents; the mode, not a sample."""
        pixels = images if images.is_floating_point() else images.float().div(127.5).sub(1)
        found = self.model.encode(like_weights(pixels.to(self._dtype)))
        latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        scaled: Tensor = (latents.float() - self._shift) * self._scale
        return scaled

    def decode_float(self, latents: Tensor) -> Tensor:
        """Float32 latents -> float32 images around [-1, 1]."""
        raw = latents / self._scale + self._shift
        image: Tensor = self.model.decode(like_weights(raw.to(self._dtype))).sample
        return image.float()


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255: clamp, scale, round half to even. The one place where pixels are made."""
    import torch

    return images.clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


def open_autoencoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """An autoencoder from a directory of its own, not held to any lock."""
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    files = Files({f"vae/{name}": path / name for name in names})
    return Autoencoder(files, device=device, dtype=dtype)
