"""Sampling that is pulled towards the centre of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, Condition
from d3pack.decode import denoiser, noise, samplers
from d3pack.format import Recipe


@dataclass(frozen=True, slots=True)
class ModeGuidance:
    """A sampler whose noise is shifted towards a centre, in a first part of its steps.

    A step of the paper adds `pull * sigma * (centre - x0)` to the mean of the next x, where sigma
    is the deviation of the step's fresh noise. So fresh noise is drawn around `pull * (centre -
    x0)` in place of 0, and the sampler stays as it is.
    """

    backbone: Backbone
    recipe: Recipe
    pull: float
    steps: int  # that are pulled

    @torch.inference_mode()
    def sample(
        self, seed: int, c: int, condition: Condition, none: Condition | None, centres: Tensor
    ) -> Tensor:
        """Return latents of class c, one for each centre (N, C, H, W), on the CPU."""
        group, device = self.recipe.group, self.backbone.device
        model = denoiser(
            self.backbone,
            condition.expand(group),
            none,
            self.recipe.guidance,
            self.recipe.guided_channels,
        )
        parts = []
        for first in range(0, len(centres), group):
            # a full group, so that an image does not depend on how many there are
            numbers = np.arange(first, first + group)
            padded = centres[torch.from_numpy(np.minimum(numbers, len(centres) - 1))]
            made = self._group(seed, c, numbers, model, padded.to(device))
            parts.append(made[: len(centres) - first].float().cpu())
        return torch.cat(parts)

    def _group(
        self, seed: int, c: int, numbers: npt.NDArray[Any], model: samplers.Model, centres: Tensor
    ) -> Tensor:
        sigmas = self.recipe.sigmas
        seen = centres  # what the model saw last

        def watched(x: Tensor, sigma: float) -> Tensor:
            nonlocal seen
            seen = model(x, sigma)
            return seen

        def drawn(step: int) -> Tensor:
            shape, draw = tuple(centres.shape[1:]), noise.draw_number(step)
            fresh = noise.normal_torch(seed, c, numbers, shape, draw, self.backbone.device)
            pulled = 1 <= step <= self.steps
            return fresh + (centres - seen) * self.pull if pulled else fresh

        x = samplers.start(drawn(0), sigmas)
        return samplers.sample(self.recipe.sampler, watched, x, sigmas, drawn, self.recipe.extra)
