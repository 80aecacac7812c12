"""The small autoencoder of TAESD's kind: convolutions with ReLU between latents and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from d3pack.backbones.models.config import settings_of

if TYPE_CHECKING:
    from torch import Tensor


class Encoded(NamedTuple):
    latents: Tensor


class Decoded(NamedTuple):
    sample: Tensor


class AutoencoderTiny(nn.Module):
    """An encoder and a decoder of as many stages as there are widths."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        decoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        num_decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        config = settings_of(locals())
        super().__init__()
        self.config = config
        if act_fn != "relu":
            raise ValueError(f"act_fn {act_fn!r} is not relu")
        stages = list(zip(num_encoder_blocks, encoder_block_out_channels, strict=True))
        self.encoder = _Encoder(in_channels, latent_channels, stages)
        stages = list(zip(num_decoder_blocks, decoder_block_out_channels, strict=True))
        up = (upsampling_scaling_factor, upsample_fn)
        self.decoder = _Decoder(latent_channels, out_channels, stages, *up)

    def encode(self, images: Tensor) -> Encoded:
        """Return latents of images in [-1, 1]."""
        return Encoded(self.encoder(images))

    def decode(self, latents: Tensor) -> Decoded:
        """Return images around [-1, 1]."""
        return Decoded(self.decoder(latents))


class _Encoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, stages: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (blocks, width) in enumerate(stages):
            if index == 0:
                layers.append(_conv(inputs, width))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [_Block(width) for _ in range(blocks)]
        layers.append(_conv(stages[-1][1], outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images.add(1).div(2))
        return out


class _Decoder(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stages: Sequence[tuple[int, int]], factor: int, mode: str
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(inputs, stages[0][1]), nn.ReLU()]
        for index, (blocks, width) in enumerate(stages):
            is_last = index == len(stages) - 1
            layers += [_Block(width) for _ in range(blocks)]
            if not is_last:
                layers.append(nn.Upsample(scale_factor=factor, mode=mode))
            layers.append(
                nn.Conv2d(width, outputs if is_last else width, 3, padding=1, bias=is_last)
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.tanh(latents / 3) * 3)
        return out.mul(2).sub(1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fuse(self.conv(x) + x)
        return out


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
