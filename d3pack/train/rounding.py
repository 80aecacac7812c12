"""Matrices in four bits while a model learns: the rule by which a pack carries them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from d3pack.format import GROUP
from d3pack.train.loop import EDGES


def in_four_bits(name: str) -> bool:
    """Return whether a matrix of this name is rounded to four bits.

    First and last layers and tables are small, and more than half of what rounding costs is theirs.
    """
    return not any(edge in name for edge in EDGES)


def rounded(weight: Tensor) -> Tensor:
    """Return a matrix as four bits store it; gradients pass as if it were not rounded."""
    values = weight.detach().half().float().flatten()
    groups = functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    scales = (torch.where(high > -low, high, low) / -8).half().float()
    codes = (groups / torch.where(scales != 0, scales, 1.0)).round().clamp(-8, 7)
    stored = (codes * scales).half().float().flatten()[: len(values)].view(weight.shape)
    return stored.to(weight.dtype) + (weight - weight.detach())


def call_rounded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a model whose matrices are rounded."""
    matrices = {
        name: rounded(weight)
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and in_four_bits(name)
    }
    # blocks share modules: tied by names as well, the last of these would stay rounded
    return functional_call(model, matrices, args, kwargs, tie_weights=False)
