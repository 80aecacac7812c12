"""PRX: text enters every block as keys and values; T5Gemma, the autoencoder of FLUX.1 or DC-AE."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from d3pack.backbones.flow import Family, FlowTransformer, layout
from d3pack.backbones.language import Prompting
from d3pack.backbones.protocol import Sampling

LAYOUT = layout("PRXTransformer2DModel")


def _velocity(model: Any, x_t: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
    tokens = (vectors != 0).any(-1)
    out: Tensor = model(x_t, times, vectors, attention_mask=tokens, return_dict=False)[0]
    return out


PRX = partial(
    FlowTransformer,
    Family(
        transformer="PRXTransformer2DModel",
        velocity=_velocity,
        width="context_in_dim",
        vectors=256,
        prompting=Prompting("T5GemmaEncoder", "gemma", lower=True),
        size=512,
        sampling=Sampling("euler", 28, 5.0),
        patch=2,
        padded=True,
    ),
)
