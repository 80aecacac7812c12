"""Muon for weight matrices, AdamW for the rest.

An update is the momentum with all its singular values set to one, so that rare directions learn as
fast as common ones. It costs a few matrix products a step, not more memory than one moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d3pack.system import fast_bfloat16
from d3pack.teachers import newton_schulz

_MOMENTUM = 0.95


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values near one.

    Products are bfloat16 where the device is not slower with them.
    """
    dtype = torch.bfloat16 if fast_bfloat16(matrix.device) else torch.float32
    return newton_schulz(matrix.to(dtype), rounds=5)


class Muon(torch.optim.AdamW):
    """AdamW, but groups marked `matrices` step by Muon, as far as AdamW would at the same rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group["matrices"]]
        super().step()
        self.param_groups = every
        for group in every:
            for weight in group["params"] if group["matrices"] else ():
                if weight.grad is not None:
                    self._turn(weight, weight.grad, group["lr"], group["weight_decay"])

    def _turn(self, weight: Tensor, grad: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            # AdamW looks for the count when a saved state is put back
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        update = grad.lerp(momentum, _MOMENTUM).flatten(1)
        step = orthogonalised(update).to(weight.dtype).reshape(weight.shape)
        weight.mul_(1 - rate * weight_decay)
        weight.add_(step, alpha=-rate * 0.2 * max(update.shape) ** 0.5)


def grouped(module: nn.Module, names_apart: Sequence[str]) -> list[dict[str, Any]]:
    """Parameter groups: matrices, other decayed weights (first and last layers), and the rest."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            apart = any(part in name for part in names_apart)
            (plain if weight.ndim < 2 else decayed if apart else matrices).append(weight)
    return [
        {"params": matrices, "matrices": True},
        {"params": decayed, "matrices": False},
        {"params": plain, "matrices": False, "weight_decay": 0.0},
    ]
