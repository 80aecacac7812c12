"""Z-Image: one stream of image and text tokens; the second to last layer of Qwen 3."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from d3pack.backbones.flow import Family, FlowTransformer, layout
from d3pack.backbones.language import Prompting
from d3pack.backbones.protocol import Sampling

LAYOUT = layout("ZImageTransformer2DModel")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # of Qwen 3


def _velocity(model: Any, x_t: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
    images, texts = list(x_t[:, :, None].unbind(0)), list(vectors.unbind(0))
    out = model(images, 1 - times, texts, return_dict=False)[0]
    return -torch.stack(out)[:, :, 0]


ZImage = partial(
    FlowTransformer,
    Family(
        transformer="ZImageTransformer2DModel",
        velocity=_velocity,
        width="cap_feat_dim",
        vectors=512,
        prompting=Prompting("Qwen3Model", "qwen", CHAT, layers=(-2,)),
        size=1024,
        sampling=Sampling("euler", 8, 1.0),
        patch=2,
    ),
)
