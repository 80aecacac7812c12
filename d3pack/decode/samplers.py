"""Sigma schedules and samplers, which turn noise into x0 by calls of a model.

The scale is x = x0 + sigma * eps (variance exploding), where a model is a function (x, sigma) -> x0
and each sampler is a linear multistep rule

    x[i+1] = a * x[i] + sum_j b[j] * x0[i-j] + c * noise[i+1]

with coefficients that depend on the sigmas alone. So a sampler is a table of `Step`s, computed on
the host in double precision, and one loop applies any table. Multiplications and additions are
separate operations: a fused one rounds differently, and not every device fuses everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import SAMPLERS, eta_of, table_rows

if TYPE_CHECKING:
    from torch import Tensor

Model = Callable[["Tensor", float], "Tensor"]
Noise = Callable[[int], "Tensor"]
_LCM_STEPS = 50  # steps of the teacher in latent consistency distillation, as in diffusers


@dataclass(frozen=True, slots=True)
class Step:
    """x' = a * x + sum b[j] * (x0 of j calls ago) + c * fresh noise."""

    a: float
    b: tuple[float, ...]
    c: float = 0.0


def timesteps(total: int, sampler: str, steps: int, spacing: str = "trailing") -> tuple[int, ...]:
    """Return descending training timesteps, spaced as by the diffusers scheduler of that name.

    "trailing" starts at the last training step (arXiv 2305.08891); "linspace" and "leading" are
    older. "leading" is that of `steps_offset` 0: what a scheduler's config adds there (1 in Stable
    Diffusion 1.5) is not added. "lcm" has its own: of every (total/50)-th timestep, some at even
    distances (arXiv 2310.04378).
    """
    _check_sampler(sampler)
    limit = min(total, _LCM_STEPS) if sampler == "lcm" else total
    if not 1 <= steps <= limit:
        raise UsageError(f"invalid steps {steps} of {sampler}: expected 1 to {limit}")
    if sampler == "lcm":
        grid = np.arange(1, limit + 1)[::-1] * (total // limit) - 1
        chosen = grid[np.floor(np.linspace(0, limit, steps, endpoint=False)).astype(np.int64)]
    elif spacing == "trailing":
        chosen = np.round(np.arange(total, 0, -total / steps))[:steps].astype(np.int64) - 1
    elif spacing == "linspace" and sampler == "dpmpp-2m":  # its scheduler leaves out timestep 0
        chosen = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    elif spacing == "linspace":
        chosen = np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    elif spacing == "leading":
        parts = steps + 1 if sampler == "dpmpp-2m" else steps
        chosen = (np.arange(parts) * (total // parts))[::-1][:steps].astype(np.int64)
    else:
        raise UsageError(f"unknown spacing {spacing!r}: expected trailing, linspace or leading")
    return tuple(int(t) for t in chosen)


def schedule(
    alphas_cumprod: npt.ArrayLike, sampler: str, steps: int, spacing: str = "trailing"
) -> tuple[float, ...]:
    """Return the sigmas of a recipe: entries of the training table, descending, and a final 0.

    Timesteps are spaced as by the diffusers scheduler of that name; "leading" is that of
    `steps_offset` 0, whatever a scheduler's config adds.
    """
    table = np.asarray(alphas_cumprod, dtype=np.float64)
    chosen = table[list(timesteps(len(table), sampler, steps, spacing))]
    return (*np.sqrt((1 - chosen) / chosen).tolist(), 0.0)


def plan(
    sampler: str, sigmas: Sequence[float], extra: Mapping[str, Any] | None = None
) -> tuple[Step, ...]:
    """Return the steps of a sampler over these sigmas; "table" reads them from `extra["table"]`."""
    _check_sampler(sampler)
    levels = [float(s) for s in sigmas]
    descending = all(a > b for a, b in pairwise(levels))
    if len(levels) < 2 or not descending or levels[-1] != 0.0 or not math.isfinite(levels[0]):
        raise InvalidPackError(
            "sigmas must be finite, strictly descending, and end in 0", code="E_RECIPE"
        )
    if sampler == "table":
        rows = table_rows((extra or {}).get("table"), len(levels) - 1)
        return tuple(Step(a, b) for a, b in rows)
    pairs = list(pairwise(levels))
    if sampler == "ancestral":
        eta = eta_of(extra or {})
        return tuple(_ancestral(high, low, eta) for high, low in pairs)
    if sampler == "lcm":
        return tuple(Step(0.0, (1.0,), low) for _, low in pairs)
    if sampler == "dpmpp-2m":
        return tuple(_second_order(levels, i) for i in range(len(pairs)))
    # DDIM without noise and Euler are the same step once x is in this scale
    return tuple(Step(low / high, (1 - low / high,)) for high, low in pairs)


def _ancestral(high: float, low: float, eta: float) -> Step:
    """Return a step that replaces a part of the noise by fresh noise.

    With eta 1 this is DDPM's step, with 0 that of `euler`; a large eta replaces all of it.
    """
    fresh = min(low, eta * (low * math.sqrt(high * high - low * low) / high))
    kept = math.sqrt(low * low - fresh * fresh)
    return Step(kept / high, (1 - kept / high,), fresh)


def _second_order(levels: list[float], i: int) -> Step:
    """Return a step of DPM-Solver++(2M), arXiv 2211.01095; first and last are of first order."""
    high, low = levels[i], levels[i + 1]
    gain = 1 - low / high
    if i == 0 or low == 0.0:
        return Step(low / high, (gain,))
    half = 0.5 * math.log(high / low) / math.log(levels[i - 1] / high)  # 1 / (2r)
    return Step(low / high, (gain * (1 + half), -gain * half))


def start(noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Return the first x: as in training, of unit variance in the variance-preserving scale."""
    return noise * math.sqrt(sigmas[0] ** 2 + 1)


def sample(
    sampler: str,
    model: Model,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return x0 by a sampler from x. `noise(i)`, i from 1, is fresh noise, which "lcm" needs."""
    steps = plan(sampler, sigmas, extra)
    reach = max(len(step.b) for step in steps)
    calls: list[Tensor] = []  # newest first
    for i, step in enumerate(steps):
        calls = [model(x, float(sigmas[i])), *calls][:reach]
        if step.a:
            x = x * step.a
            x = x + calls[0] * step.b[0]
        else:
            x = calls[0] * step.b[0]
        for earlier, weight in zip(calls[1:], step.b[1:], strict=False):
            x = x + earlier * weight
        if step.c:
            if noise is None:
                raise UsageError(f"the sampler {sampler} needs fresh noise", hint="pass noise=")
            x = x + noise(i + 1) * step.c
    return x


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise InvalidPackError(
            f"unknown sampler {sampler!r}", code="E_RECIPE", hint=f"one of {', '.join(SAMPLERS)}"
        )
