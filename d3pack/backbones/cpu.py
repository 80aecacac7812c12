"""What makes a model quick on a CPU: linear layers through oneDNN, channels last.

PyTorch sends float32 matrix products to MKL, which leaves half of the machine unused on processors
of another maker; oneDNN, which does the convolutions anyway, does not. And oneDNN likes its
channels last: an autoencoder gains a third. Same sums, other order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def quicken(model: Any) -> None:
    """Change the layers of a model on a CPU; its state and its meaning stay."""
    model.to(memory_format=torch.channels_last)
    if not hasattr(_ops(), "_linear_pointwise"):  # a build without oneDNN
        return
    for module in model.modules():
        if type(module) is nn.Linear and _suits(module.weight):
            module.__class__ = _OneDnnLinear


def like_weights(x: Tensor) -> Tensor:
    """Channels last on a CPU, as the weights are; elsewhere as it comes."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class _OneDnnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not _suits(weight) or not _suits(x) or weight.requires_grad:
            return super().forward(x)
        bias = self.bias
        if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
            return self._product(x, None) + bias  # a bias may learn where its weight does not
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Frozen.apply(x, self.weight, bias)  # type: ignore[no-untyped-call]
            return out
        return _linear(x, self.weight, bias)


class _Frozen(torch.autograd.Function):
    """The same with a gradient for the input; the weights of a backbone do not learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _linear(grads[0], ctx.weight.t().contiguous(), None), None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _ops()._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _suits(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _ops() -> Any:
    return torch.ops.mkldnn
