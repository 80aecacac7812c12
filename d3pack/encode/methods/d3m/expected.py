"""What a prompt is taught at a noised latent: not the one image it came from, but their mean.

Many images of a class can lie under one noised latent, above all at high noise. The squared error
to a single one has the same mean gradient as the error to their average weighed by how likely each
is, and more variance: half of it, at the loudest levels, is only about which image was drawn
(Xu, Tong and Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion
Models", 2023; there over a batch, here over all the images that a prompt learns from).
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3pack.backbones.levels import Levels


def expected_target(
    levels: Levels, x0: Tensor, eps: Tensor, t: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Noised latents, and what the model should say there on average over `latents`.

    x0 are some of the latents.
    """
    x_t = levels.noised(x0, eps, t)
    every = latents.flatten(1).double()  # the exponents are differences of large numbers
    alphas = every.new_tensor(levels.alphas_cumprod)[t.to(every.device)][:, None]
    # log of exp(-|x_t - sqrt(alpha) x|^2 / (2 (1 - alpha))), without what all images share
    near = alphas.sqrt() * (x_t.flatten(1).double() @ every.T) - alphas * every.square().sum(1) / 2
    mean = torch.softmax(near / (1 - alphas), 1) @ every
    return x_t, levels.target_towards(x_t, mean.reshape(x0.shape).to(x0.dtype), t)
