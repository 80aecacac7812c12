"""Sana-Sprint: two steps, linear attention, Gemma 2, an autoencoder of 1/32 of the size.

Its paper writes noise levels as angles, x = cos(a) x0 + sin(a) eps, and its pipeline turns them
into times of flow matching and back: sigma is tan(a), what the transformer takes is x_t, and what
it returns is a velocity. The two steps start at sigma `PURE` and tan(1.3), each with fresh noise,
which is the sampler "lcm".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from d3pack.backbones.flow import Family, FlowTransformer, layout
from d3pack.backbones.language import Prompting
from d3pack.backbones.loading import config_error, number
from d3pack.backbones.protocol import Sampling

LAYOUT = layout("SanaTransformer2DModel")
GUIDANCE = 4.5  # an input of the model, not a second forward pass; the pipeline's default
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual"
        " descriptions suitable for image generation. Evaluate the level of detail in the user"
        " prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes,"
        " textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly"
        " without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round"
        " shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red"
        " flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk,"
        " featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a"
        " double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any"
        " additional commentary or evaluations:",
        "User Prompt: ",
    )
)


def _velocity(model: Any, x_t: Tensor, times: Tensor, vectors: Tensor) -> Tensor:
    guidance = x_t.new_full((len(x_t),), GUIDANCE) * model.config.guidance_embeds_scale
    out: Tensor = model(x_t, vectors, times, guidance=guidance, return_dict=False)[0]
    return out


def _check(config: Mapping[str, Any]) -> None:
    path = "transformer/config.json"
    if config.get("guidance_embeds") is not True:
        raise config_error(f"{path}: of Sana models, Sana-Sprint only is supported")
    number(path, config, "guidance_embeds_scale", 0.1)


SanaSprint = partial(
    FlowTransformer,
    Family(
        transformer="SanaTransformer2DModel",
        velocity=_velocity,
        width="caption_channels",
        vectors=300,
        prompting=Prompting("Gemma2Model", "gemma", instruction=INSTRUCTION, lower=True),
        size=1024,
        sampling=Sampling("lcm", 2, 1.0),
        # half of the time is the second step's
        shift=lambda config, tokens, steps: math.tan(1.3),
        check=_check,
    ),
)
