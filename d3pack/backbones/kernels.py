"""Faster layers for a model: what every model gets on a CPU, and the switches of fast numerics.

PyTorch computes float32 matrix products with MKL, which uses half of the machine on processors that
are not Intel's. oneDNN, which computes the convolutions, does not have that weakness, and is faster
with channels last: an autoencoder gains a third. The sums are the same, in another order.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from d3pack.backbones.models import unet

if TYPE_CHECKING:
    from torch import Tensor


def enable_fast_kernels(backbone: Any, switches: Collection[str]) -> None:
    """Turn switches of fast numerics on, in a backbone that nobody else uses."""
    if "channels_last" in switches:
        for model in (backbone.denoiser, backbone.autoencoder.model):
            model.to(memory_format=torch.channels_last)
    if "fused_attention" in switches:
        _fuse_attention(backbone.denoiser)
    if "compile" in switches:
        # the modules that are called: compiling the autoencoder around them has no effect
        for part in (backbone.denoiser, backbone.autoencoder.model.decoder):
            for module in part.modules():  # the compiler chooses kernels for plain layers
                if isinstance(module, _OneDnnLinear):
                    module.__class__ = nn.Linear  # type: ignore[assignment]
            part.compile(dynamic=False)


def _fuse_attention(model: nn.Module) -> None:
    """Compute queries, keys and values of self-attention with one product."""
    if isinstance(model, unet.UNet2DConditionModel):
        for name, module in model.named_modules():
            if name.endswith(".attn1"):
                module.fuse_projections()
        return
    from diffusers.models.attention_processor import (
        Attention,
        AttnProcessor2_0,
        FusedAttnProcessor2_0,
    )

    for name, module in model.named_modules():
        if not isinstance(module, Attention) or not name.endswith("attn1"):
            continue
        if isinstance(module.processor, AttnProcessor2_0):  # Sana's is another product
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())


def use_native_attention(model: nn.Module) -> None:
    """Compute attention with torch, whatever diffusers was told to use for all models."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName.NATIVE


def optimize_for_cpu(model: Any) -> None:
    """Compute linear layers of a model on a CPU with oneDNN, and store channels last."""
    model.to(memory_format=torch.channels_last)
    if not hasattr(_ops(), "_linear_pointwise"):  # a build without oneDNN
        return
    for module in model.modules():
        if type(module) is nn.Linear and _is_float32_on_cpu(module.weight):
            module.__class__ = _OneDnnLinear


def match_memory_format(x: Tensor) -> Tensor:
    """Return a tensor with channels last on a CPU, as the weights are; elsewhere unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class _OneDnnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not _is_float32_on_cpu(weight) or not _is_float32_on_cpu(x) or weight.requires_grad:
            return super().forward(x)
        bias = self.bias
        if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
            return self._product(x, None) + bias  # a bias may be trained where its weight is not
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _FrozenLinear.apply(x, self.weight, bias)  # type: ignore[no-untyped-call]
            return out
        return _linear(x, self.weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """The same product with a gradient for the input; the weights are not trained."""

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


def _is_float32_on_cpu(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _ops() -> Any:
    return torch.ops.mkldnn
