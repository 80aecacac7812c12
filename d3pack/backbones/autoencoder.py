"""Between latents and pixels, for all kinds of autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.backbones.kernels import match_memory_format
from d3pack.backbones.loading import Files, build, config_error, number
from d3pack.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2")


class Autoencoder:
    """An autoencoder whose latents have the diffusion model's scale.

    The scaling and shift of the config are applied here, with mean and deviation of each channel
    where it has them; or those that FLUX.2 has for each channel of its latents in patches of 2x2.
    """

    def __init__(self, files: Files, *, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        stem = "diffusion_pytorch_model"
        self.model = build(files, "vae", stem, CLASSES, device=device, dtype=dtype)
        config = self.model.config
        self.channels = int(config.latent_channels)
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        self.factor = 2 ** (len(blocks) - 1)
        self._scale: Any = number("vae/config.json", config, "scaling_factor", 1.0)
        self._shift: Any = number("vae/config.json", config, "shift_factor", 0.0)
        if self._scale == 0:
            raise config_error("vae/config.json: scaling_factor is 0")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            self._shift, std = (
                torch.tensor(_of_channels(config, key, self.channels), device=device)[:, None, None]
                for key in ("latents_mean", "latents_std")
            )
            if not (std > 0).all():
                raise config_error("vae/config.json: latents_std has numbers that are not above 0")
            self._scale = self._scale / std
        self._dtype = dtype
        self._patch = 1
        if hasattr(self.model, "bn"):
            self._patch = int(config.patch_size[0])
            eps = number("vae/config.json", config, "batch_norm_eps", 0.0)
            variance = self.model.bn.running_var.float() + eps
            if eps <= 0 or not (variance > 0).all():
                raise config_error("vae/config.json: batch_norm_eps or a variance is not above 0")
            self._scale = 1 / variance.sqrt()[:, None, None]
            self._shift = self.model.bn.running_mean.float()[:, None, None]
            self.channels *= self._patch**2
            self.factor *= self._patch

    def encode(self, images: Tensor) -> Tensor:
        """Return float32 latents of uint8 or [-1, 1] float images (B, 3, H, W).

        Of a distribution over latents it is the mode, not a sample.
        """
        import torch

        pixels = images if images.is_floating_point() else images.float().div(127.5).sub(1)
        encoded = self.model.encode(match_memory_format(pixels.to(self._dtype)))
        latents = _latents(encoded).float()
        if self._patch > 1:
            latents = torch.nn.functional.pixel_unshuffle(latents, self._patch)
        scaled: Tensor = (latents - self._shift) * self._scale
        return scaled

    def decode_float(self, latents: Tensor) -> Tensor:
        """Return float32 images around [-1, 1] of float32 latents."""
        import torch

        raw = latents / self._scale + self._shift
        if self._patch > 1:
            raw = torch.nn.functional.pixel_shuffle(raw, self._patch)
        images: Tensor = self.model.decode(match_memory_format(raw.to(self._dtype))).sample
        return images.float()


def _of_channels(config: Any, key: str, channels: int) -> list[float]:
    """Return a number for each channel."""
    values = config.get(key)
    if not isinstance(values, list | tuple) or len(values) != channels or None in values:
        raise config_error(f"vae/config.json: {key} has not {channels} numbers")
    return [number("vae/config.json", {key: value}, key, 0.0) for value in values]


def _latents(encoded: Any) -> Tensor:
    """Return what an autoencoder has encoded; of a distribution, the mode."""
    for name in ("latents", "latent"):
        if hasattr(encoded, name):
            latents: Tensor = getattr(encoded, name)
            return latents
    mode: Tensor = encoded.latent_dist.mode()
    return mode


def to_uint8(images: Tensor) -> Tensor:
    """Return [-1, 1] images as 0..255: clamp, scale, round half to even.

    All pixels of d3pack are made here.
    """
    import torch

    return images.clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


def to_grey(images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) with their luma (ITU-R BT.601) in each channel."""
    import torch

    red, green, blue = images.int().unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return luma.to(torch.uint8)[:, None].expand_as(images).contiguous()


def open_autoencoder(path: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Open an autoencoder from a directory of its own, without a lock."""
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    files = Files({f"vae/{name}": path / name for name in names})
    return Autoencoder(files, device=device, dtype=dtype)


def replace_autoencoder(backbone: Any, path: Path) -> None:
    """Let a backbone that nobody else uses decode with another autoencoder of equal latents."""
    other = open_autoencoder(path, device=backbone.device, dtype=backbone.dtype)
    own = backbone.autoencoder
    if (other.channels, other.factor) != (own.channels, own.factor):
        raise UsageError(
            f"the autoencoder in {path} has {other.channels} channels at 1/{other.factor} of the"
            f" size, the backbone's has {own.channels} at 1/{own.factor}"
        )
    backbone.autoencoder = other
