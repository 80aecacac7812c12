"""Adapters: small named tensors that tune a denoiser, applied and removed without reloading.

The name of a tensor is that of a parameter w, a dot, and what is done to it:

    <parameter>.scale     w * scale         one value, or one for each output row
    <parameter>.gain      w * (1 + gain)    the same, for scales near one
    <parameter>.delta     w + delta         of the parameter's shape
    <parameter>.lora_a    w + b @ a         a: (rank, inputs), b: (outputs, rank)
    <parameter>.lora_b

in this order. Removing an adapter copies the original weights back, so every bit is as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from d3pack.errors import InvalidPackError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones.protocol import Backbone

_OPERATIONS = ("scale", "gain", "delta", "lora_a", "lora_b")


def check_adapter(backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Raise `InvalidPackError` (E_ADAPTER) unless every tensor fits a parameter."""
    for name, parts in _by_parameter(tensors).items():
        parameter = backbone.named_tensors().get(name)
        if parameter is None:
            raise InvalidPackError(
                f"the adapter tunes {name}, which the backbone does not have",
                code="E_ADAPTER",
                hint="it was made for another backbone",
            )
        for operation, tensor in parts.items():
            if not _fits(operation, tensor, parameter):
                raise InvalidPackError(
                    f"{name}.{operation} of shape {tuple(tensor.shape)} does not fit"
                    f" {tuple(parameter.shape)}",
                    code="E_ADAPTER",
                )
        a, b = parts.get("lora_a"), parts.get("lora_b")
        if (a is None) != (b is None) or (a is not None and b is not None and len(a) != b.shape[1]):
            raise InvalidPackError(
                f"the low-rank factors of {name} do not belong together", code="E_ADAPTER"
            )


def _fits(operation: str, tensor: Tensor, parameter: Tensor) -> bool:
    shape = tuple(tensor.shape)
    if operation in ("scale", "gain"):
        return tensor.numel() == 1 or shape == tuple(parameter.shape[:1])
    if operation == "delta":
        return shape == tuple(parameter.shape)
    inputs = parameter[0].numel() if parameter.ndim > 1 else 1
    if operation == "lora_a":
        return len(shape) == 2 and shape[1] == inputs
    return len(shape) == 2 and shape[0] == parameter.shape[0]


@contextmanager
def apply_adapter(backbone: Backbone, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Tune the backbone for the length of a `with` block."""
    if not tensors:
        yield
        return
    named = backbone.named_tensors()
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, parts in _by_parameter(tensors).items():
                weight = named[name].data
                saved.append((weight, weight.clone()))
                weight.copy_(_tuned(weight, parts))
        backbone.changed()
        yield
    finally:
        with torch.no_grad():
            for weight, original in saved:
                weight.copy_(original)
        backbone.changed()


def _tuned(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    tuned = weight.float()
    wide = {operation: tensor.to(tuned) for operation, tensor in parts.items()}
    rows = (-1, *(1,) * (weight.ndim - 1)) if weight.ndim else ()
    if (scale := wide.get("scale")) is not None:
        tuned = tuned * scale.reshape(rows)
    if (gain := wide.get("gain")) is not None:
        tuned = tuned * (1 + gain.reshape(rows))
    if (delta := wide.get("delta")) is not None:
        tuned = tuned + delta
    if "lora_a" in wide:
        tuned = tuned + (wide["lora_b"] @ wide["lora_a"]).reshape(tuned.shape)
    return tuned


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors by the name of the parameter and the operation."""
    parameters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, operation = name.rpartition(".")
        if operation not in _OPERATIONS:
            raise InvalidPackError(
                f"{name} does not end in one of .{', .'.join(_OPERATIONS)}", code="E_ADAPTER"
            )
        parameters.setdefault(parameter, {})[operation] = tensor
    return parameters
