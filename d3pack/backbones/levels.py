"""The noise levels a model was trained on, and what its outputs mean there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from d3pack.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
_ZERO_SNR = 2.0**-24  # what diffusers puts in place of an alpha of exactly 0
_NEAR = 1e-5  # a relative distance in sigma below which a table entry is meant


@dataclass(frozen=True)
class Levels:
    """Discrete training levels: x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps."""

    alphas_cumprod: npt.NDArray[np.float64]
    prediction: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Levels:
        """Read a diffusers scheduler config; its class matters little, its betas all."""
        total = config.get("num_train_timesteps", 1000)
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise BackboneError(
                f"prediction_type {prediction!r} is not one of {', '.join(PREDICTIONS)}",
                code="E_BACKBONE_CONFIG",
            )
        if not isinstance(total, int) or not 2 <= total <= 100_000:
            raise BackboneError(f"num_train_timesteps is {total!r}", code="E_BACKBONE_CONFIG")
        name = config.get("beta_schedule", "linear")
        trained = config.get("trained_betas")
        try:
            betas = _betas(name, total, float(first), float(last), trained)
        except (TypeError, ValueError):
            raise BackboneError(
                "the scheduler's betas are not numbers", code="E_BACKBONE_CONFIG"
            ) from None
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise BackboneError(
                "the scheduler's betas do not lie between 0 and 1", code="E_BACKBONE_CONFIG"
            )
        alphas = np.cumprod(1.0 - betas)
        if config.get("rescale_betas_zero_snr"):
            root = np.sqrt(alphas)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            alphas = np.maximum(root**2, _ZERO_SNR)
        return cls(alphas.astype(np.float64), prediction)

    @property
    def sigmas(self) -> npt.NDArray[np.float64]:
        """sqrt((1 - alpha) / alpha) of each training timestep, ascending."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def timestep(self, sigma: float) -> float:
        """The timestep of a sigma: a whole one where the table has it, else between two."""
        table = self.sigmas
        nearest = int(np.abs(np.log(table) - math.log(sigma)).argmin())
        if abs(sigma - table[nearest]) <= _NEAR * table[nearest]:
            return float(nearest)
        return float(np.interp(math.log(sigma), np.log(table), np.arange(len(table))))

    def denoised(self, x: Tensor, sigma: float, out: Tensor) -> Tensor:
        """x0 from x = x0 + sigma * eps and the model's output there."""
        if self.prediction == "epsilon":
            return x - out * sigma
        if self.prediction == "sample":
            return out
        scale = 1 / math.sqrt(sigma**2 + 1)
        return x * (scale * scale) - out * (sigma * scale)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of the training scale, for timesteps t (B,)."""
        alpha, beta = self._scales(t, x0)
        return x0 * alpha + eps * beta

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the model is trained to say at x_t."""
        alpha, beta = self._scales(t, x0)
        return {
            "epsilon": lambda: eps,
            "sample": lambda: x0,
            "v_prediction": lambda: eps * alpha - x0 * beta,
        }[self.prediction]()

    def target_towards(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The same for an x0 that x_t need not come from."""
        alpha, beta = self._scales(t, x_t)
        return self.target(x0, (x_t - x0 * alpha) / beta, t)

    def x0(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """x0 from x_t of the training scale and the model's output, for timesteps t (B,)."""
        alpha, beta = self._scales(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - out * beta) / alpha
        return out if self.prediction == "sample" else x_t * alpha - out * beta

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = like.new_tensor(np.sqrt(self.alphas_cumprod))[t.to(like.device)]
        betas = like.new_tensor(np.sqrt(1 - self.alphas_cumprod))[t.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alphas.reshape(shape), betas.reshape(shape)


class Timesteps:
    """Timesteps on a device, each copied there once: on CUDA a copy waits for all work before it.

    float32 whatever torch's default is, and of use with and without gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[float, Tensor] = {}

    def __call__(self, timestep: float) -> Tensor:
        import torch

        found = self._known.get(timestep)
        if found is None:
            with torch.inference_mode(False):
                found = torch.tensor(timestep, dtype=torch.float32, device=self._device)
            self._known[timestep] = found
        return found


def _betas(
    name: str, total: int, first: float, last: float, trained: Any
) -> npt.NDArray[np.float64]:
    if trained is not None:
        return np.asarray(trained, dtype=np.float64)
    if name == "linear":
        return np.linspace(first, last, total)
    if name == "scaled_linear":
        return np.linspace(math.sqrt(first), math.sqrt(last), total) ** 2
    if name == "squaredcos_cap_v2":
        edges = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - edges[1:] / edges[:-1], 0.999), dtype=np.float64)
    raise BackboneError(f"beta_schedule {name!r} is unknown", code="E_BACKBONE_CONFIG")
