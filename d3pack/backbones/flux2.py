"""FLUX.2 klein: two streams, then one; three layers of Qwen 3, latents in patches of 2x2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d3pack.backbones.flow import Family, FlowTransformer, layout
from d3pack.backbones.language import Prompting
from d3pack.backbones.levels import MAX_SHIFT
from d3pack.backbones.protocol import Sampling
from d3pack.backbones.z_image import CHAT

LAYOUT = layout("Flux2Transformer2DModel")


def _velocity(model: Any, x_t: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
    height, width = x_t.shape[2:]
    out: Tensor = model(
        x_t.flatten(2).transpose(1, 2),
        vectors,
        times,
        img_ids=_positions(1, height, width, 1, device=x_t.device),
        txt_ids=_positions(1, 1, 1, vectors.shape[1], device=x_t.device),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).reshape(x_t.shape)


def _positions(*sizes: int, device: torch.device) -> Tensor:
    """Return the places (time, row, column, word) of all tokens."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def _shift(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """Return the shift that was fitted to FLUX.2 for this many image tokens and steps."""
    many = 0.00016927 * tokens + 0.45666666  # log of the shift at 200 steps
    few = 8.73809524e-05 * tokens + 1.89833333  # and at 10
    log = many if tokens > 4300 else many + (few - many) * (200 - steps) / 190
    limit = math.log(MAX_SHIFT) - 1e-9  # reached by images and steps that it was not fitted to
    return math.exp(min(max(log, -limit), limit))


Flux2 = partial(
    FlowTransformer,
    Family(
        transformer="Flux2Transformer2DModel",
        velocity=_velocity,
        width="joint_attention_dim",
        vectors=512,
        prompting=Prompting(
            "Qwen3Model", "qwen", CHAT + "<think>\n\n</think>\n\n", layers=(9, 18, 27)
        ),
        size=1024,
        sampling=Sampling("euler", 4, 1.0),
        base=Sampling("euler", 50, 4.0),
        shift=_shift,
    ),
)
