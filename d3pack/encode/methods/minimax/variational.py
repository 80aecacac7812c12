"""The loss of a learned variance: improved diffusion's bound (arXiv 2102.09672), as DiT trains it.

Its gradient reaches the variance alone; the mean is taken as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Levels

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Posterior:
    """q(x_{t-1} | x_t, x_0) of every timestep."""

    from_x0: Array
    from_xt: Array
    least: Array  # log variance of the posterior: the least that a model can predict
    most: Array  # log beta: the most

    @classmethod
    def of(cls, levels: Levels) -> Posterior:
        alphas = levels.alphas_cumprod
        before = np.append(1.0, alphas[:-1])
        betas = 1 - alphas / before
        variance = betas * (1 - before) / (1 - alphas)
        return cls(
            from_x0=betas * np.sqrt(before) / (1 - alphas),
            from_xt=(1 - before) * np.sqrt(1 - betas) / (1 - alphas),
            least=np.log(np.append(variance[1], variance[1:])),  # the first one would be 0
            most=np.log(betas),
        )

    def bound(
        self, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, variance: Tensor
    ) -> Tensor:
        """Return bits a value, (B,): KL of the model's step from the true one.

        At t = 0 they are the likelihood.
        """

        def at(values: Array) -> Tensor:
            return x0.new_tensor(values)[t].reshape(-1, 1, 1, 1)

        a, b = at(self.from_x0), at(self.from_xt)
        true, mean = a * x0 + b * x_t, a * predicted.detach() + b * x_t
        share = (variance + 1) / 2
        wide, narrow = at(self.most), at(self.least)
        log_variance = share * wide + (1 - share) * narrow
        kl = 0.5 * (
            log_variance
            - narrow
            - 1
            + torch.exp(narrow - log_variance)
            + (true - mean) ** 2 * torch.exp(-log_variance)
        )
        last = -_log_likelihood(x0, mean, 0.5 * log_variance)
        bits = torch.where((t == 0).reshape(-1, 1, 1, 1), last, kl)
        return bits.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of bins of 2/255 between -1 and 1 under a normal distribution."""
    centred, inverse = x - mean, torch.exp(-log_scale)

    def below(value: Tensor) -> Tensor:
        root = math.sqrt(2 / math.pi)
        return 0.5 * (1 + torch.tanh(root * (value + 0.044715 * value**3)))

    upper = below(inverse * (centred + 1 / 255))
    lower = below(inverse * (centred - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    first = upper.clamp(min=1e-12).log()
    last = (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))
