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

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of schedulers with betas
VELOCITY = "velocity"  # of flow matching
MAX_SHIFT = 100.0
PURE = 1e6  # the largest sigma of a recipe: there x is noise alone
_ZERO_SNR = 2.0**-24  # what diffusers puts in place of an alpha of exactly 0
_CLOSE = 1e-5  # relative distance in sigma below which an entry of the table is meant


@dataclass(frozen=True)
class Levels:
    """Discrete training levels, with two scales of what a model takes.

    Diffusion has x_t = sqrt(alpha) x0 + sqrt(1 - alpha) eps; flow matching, whose models predict
    the velocity eps - x0, has x_t = (1 - time) x0 + time * eps. In the scale of samplers,
    x = x0 + sigma * eps, both are the same: sigma is sqrt((1 - alpha) / alpha), or
    time / (1 - time).
    """

    alphas_cumprod: npt.NDArray[np.float64]  # of flow matching: 1 / (1 + sigma^2)
    prediction: str  # one of PREDICTIONS, or VELOCITY

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Levels:
        """Return the levels of a diffusers scheduler config.

        The scheduler's class is ignored, but for those whose models take x at another scale.
        """
        name = str(config.get("_class_name"))
        if name.startswith(("EDM", "FlowMatch")):
            raise _config_error(f"models with the scheduler {name:.80} are not supported here")
        total = config.get("num_train_timesteps", 1000)
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise _config_error(
                f"prediction_type {prediction!r:.40} is not one of {', '.join(PREDICTIONS)}"
            )
        if not isinstance(total, int) or not 2 <= total <= 100_000:
            raise _config_error(f"num_train_timesteps is {total!r:.40}")
        schedule = config.get("beta_schedule", "linear")
        trained = config.get("trained_betas")
        try:
            betas = _betas(schedule, total, float(first), float(last), trained)
        except (OverflowError, TypeError, ValueError):
            raise _config_error("the scheduler's betas are not numbers") from None
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise _config_error("the scheduler's betas do not lie between 0 and 1")
        alphas = np.cumprod(1.0 - betas)
        if config.get("rescale_betas_zero_snr"):
            root = np.sqrt(alphas)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            alphas = np.maximum(root**2, _ZERO_SNR)
        return cls(alphas.astype(np.float64), prediction)

    @classmethod
    def flow(cls, shift: float = 1.0, total: int = 1000) -> Levels:
        """Return the levels of flow matching at times 1/total, 2/total, ..., 1.

        A `shift` above 1 moves them towards noise, as diffusers' scheduler does: sigma is
        multiplied by it. The last level is noise alone, and has the sigma `PURE`.
        """
        if not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
            raise _config_error(f"the scheduler's shift is {shift!r}, not from 0.01 to 100")
        times = np.arange(1, total) / total
        sigmas = np.append(np.minimum(shift * times / (1 - times), PURE / 2), PURE * (1 - 1e-12))
        return cls(1 / (1 + sigmas**2), VELOCITY)

    @property
    def sigmas(self) -> npt.NDArray[np.float64]:
        """sqrt((1 - alpha) / alpha) of each training timestep, ascending."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    @property
    def powers(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Squares of the weights of x0 and of eps in x_t, for each training timestep."""
        if self.prediction == VELOCITY:
            return (1 / (1 + self.sigmas)) ** 2, (self.sigmas / (1 + self.sigmas)) ** 2
        return self.alphas_cumprod, 1 - self.alphas_cumprod

    def time(self, sigma: float) -> float:
        """Return the time of a sigma in flow matching: 1 for `PURE`, where x is noise alone."""
        return 1.0 if sigma >= PURE * (1 - _CLOSE) else sigma / (1 + sigma)

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """The time of each training timestep in flow matching."""
        return np.array([self.time(sigma) for sigma in self.sigmas.tolist()])

    def timestep(self, sigma: float) -> float:
        """Return the timestep of a sigma: a whole one where the table has it, else between two."""
        table = self.sigmas
        nearest = int(np.abs(np.log(table) - math.log(sigma)).argmin())
        if abs(sigma - table[nearest]) <= _CLOSE * table[nearest]:
            return float(nearest)
        return float(np.interp(math.log(sigma), np.log(table), np.arange(len(table))))

    def scaled(self, x: Tensor, sigma: float) -> Tensor:
        """Return x_t, which the model takes, from x = x0 + sigma * eps."""
        return x / (1 + sigma if self.prediction == VELOCITY else math.sqrt(sigma**2 + 1))

    def denoised(self, x: Tensor, sigma: float, out: Tensor) -> Tensor:
        """Return x0 from x = x0 + sigma * eps and the model's output there."""
        if self.prediction == "epsilon":
            return x - out * sigma
        if self.prediction == "sample":
            return out
        if self.prediction == VELOCITY:
            return x * (1 / (1 + sigma)) - out * (sigma / (1 + sigma))
        scale = 1 / math.sqrt(sigma**2 + 1)
        return x * (scale * scale) - out * (sigma * scale)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t of the training scale, for timesteps t (B,)."""
        alpha, beta = self._scales(t, x0)
        return x0 * alpha + eps * beta

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the model is trained to predict at x_t."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        if self.prediction == VELOCITY:
            return eps - x0
        alpha, beta = self._scales(t, x0)
        return eps * alpha - x0 * beta

    def target_towards(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the target at x_t for an x0 that x_t was not made from."""
        alpha, beta = self._scales(t, x_t)
        return self.target(x0, (x_t - x0 * alpha) / beta, t)

    def x0(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Return x0 from x_t of the training scale and the model's output, for timesteps t (B,)."""
        if self.prediction == "sample":
            return out
        alpha, beta = self._scales(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - out * beta) / alpha
        if self.prediction == VELOCITY:
            return x_t - out * beta
        return x_t * alpha - out * beta

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        of_x0, of_eps = self.powers
        alphas = like.new_tensor(np.sqrt(of_x0))[t.to(like.device)]
        betas = like.new_tensor(np.sqrt(of_eps))[t.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alphas.reshape(shape), betas.reshape(shape)


class Timesteps:
    """Timesteps on a device, each copied there once: on CUDA every copy waits for earlier work.

    They are float32 whatever torch's default is, and can be used with and without gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[float, Tensor] = {}

    def __call__(self, timestep: float) -> Tensor:
        import torch

        if timestep not in self._known:
            with torch.inference_mode(False):
                tensor = torch.tensor(timestep, dtype=torch.float32, device=self._device)
            self._known[timestep] = tensor
        return self._known[timestep]


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
    raise _config_error(f"beta_schedule {name!r:.40} is unknown")


def _config_error(message: str) -> BackboneError:
    return BackboneError(message, code="E_BACKBONE_CONFIG")
