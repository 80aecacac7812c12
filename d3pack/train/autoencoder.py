"""The autoencoder stage: a convolutional autoencoder whose latents stay near a PCA of 8x8 patches.

The anchor, a penalty on the distance from the PCA code, starts the encoder from the best linear
code instead of from noise. It fixes scale and rotation of the latents (few strong smooth channels,
many weak fine ones, which diffusion learns most quickly) and keeps them local.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional

from d3pack.train.config import AutoencoderConfig
from d3pack.train.data import Photos, batch_rows, save_grid
from d3pack.train.loop import Batch


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.width,) * 4,
        decoder_block_out_channels=(config.width,) * 4,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        scaling_factor=1.0 / config.raw_scale,
    )


def patch_code(photos: Photos, channels: int, power: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of an 8x8 convolution to partly whitened PCA latents of variance 1."""
    rows = photos.train[:: max(1, len(photos.train) // 8000)]
    x = torch.from_numpy(np.asarray(photos.pixels[rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
    patches = functional.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
    variance, basis = variance.flip(0)[:channels], basis.flip(1)[:, :channels]
    scale = variance.pow(-power / 2)
    scale = scale / (variance * scale.square()).mean().sqrt()
    weight = (basis * scale).T
    return weight.reshape(channels, 3, 8, 8), -(weight @ mean)


class AutoencoderModule(nn.Module):
    anchor_weight: Tensor
    anchor_bias: Tensor

    def __init__(self, config: AutoencoderConfig, anchor: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.model = build_autoencoder(config)
        self.register_buffer("anchor_weight", anchor[0])
        self.register_buffer("anchor_bias", anchor[1])

    def forward(self, images: Tensor, noise: Tensor, pull: Tensor) -> dict[str, Tensor]:
        x = images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            code = functional.conv2d(x, self.anchor_weight, self.anchor_bias, stride=8)
        raw = self.model.encoder(x)
        latents = raw.float() / self.config.raw_scale
        noisy = latents + noise * self.config.latent_noise
        out = self.model.decoder(noisy * self.config.raw_scale).float()
        error = out - x
        mse = error.square().mean()
        distance = (latents - code).square().mean()
        loss = mse + self.config.l1 * error.abs().mean() + pull * distance
        return {"loss": loss, "mse": mse, "away": distance}


class AutoencoderTask:
    """Train the autoencoder on crops, then on whole images."""

    name = "autoencoder"

    def __init__(
        self, config: AutoencoderConfig, photos: Photos, seed: int, start: Path | None = None
    ) -> None:
        self.config, self.photos, self.seed, self.start = config, photos, seed, start
        held = photos.held_out[:: max(1, len(photos.held_out) // 256)]
        self.held_out = torch.from_numpy(np.asarray(photos.pixels[held])).permute(0, 3, 1, 2)

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        module = AutoencoderModule(
            self.config, patch_code(self.photos, self.config.latent_channels)
        )
        if self.start:
            module.model = AutoencoderTiny.from_pretrained(
                self.start / "vae", torch_dtype=torch.float32
            )
        return module

    def batch(self, step: int, rank: int, world: int, progress: float) -> Batch:
        config, photos = self.config, self.photos
        rows = photos.train[
            batch_rows(len(photos.train), config.loop.batch, step * world + rank, self.seed)
        ]
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 1, step * world + rank]))
        size = photos.pixels.shape[1]
        crop = min(config.crop, size) if progress < 0.8 else size
        rows = rows if crop < size else rows[: max(1, len(rows) * config.crop**2 // size**2)]
        corners = rng.integers(0, size - crop + 1, (len(rows), 2))
        flips = rng.integers(0, 2, len(rows)) * 2 - 1
        images = np.stack(
            [
                photos.pixels[row, top : top + crop, left : left + crop][:, ::flip]
                for row, (top, left), flip in zip(rows, corners, flips, strict=True)
            ]
        )
        side = crop // 8
        noise = rng.standard_normal((len(rows), config.latent_channels, side, side), np.float32)
        start, end = config.anchor
        return {
            "images": torch.from_numpy(images).permute(0, 3, 1, 2),
            "noise": torch.from_numpy(noise),
            "pull": torch.tensor(end + (start - end) * max(0.0, 1 - 4 * progress)),
        }

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, AutoencoderModule)
        psnr, squares = [], []
        for part in torch.split(self.held_out, 64):
            x = part.to(module.anchor_bias.device).float() / 127.5 - 1
            z = module.model.encoder(x)
            y = module.model.decoder(z).clamp(-1, 1)
            psnr.append(10 * torch.log10(4 / (y - x).square().mean((1, 2, 3))))
            squares.append((z / self.config.raw_scale).square().mean((1, 2, 3)))
        return {
            "psnr": float(torch.cat(psnr).mean()),
            "latent_rms": float(torch.cat(squares).mean().sqrt()),
        }

    @torch.no_grad()
    def preview(self, module: nn.Module, path: Path) -> None:
        assert isinstance(module, AutoencoderModule)
        x = self.held_out[::8][:32].to(module.anchor_bias.device).float() / 127.5 - 1
        y = module.model.decoder(module.model.encoder(x))
        pairs = torch.stack([x, y], 1).flatten(0, 1)
        save_grid(pairs, path, columns=16)
