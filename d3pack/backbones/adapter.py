"""Adapters: small named tensors that tune a denoiser, put on and taken off without reloading.

The name of a parameter, a dot, and what is done to it:

    <parameter>.scale     w * scale    one value, or one for each output row
    <parameter>.gain      w * (1 + gain)    the same; a scale near one, as finely as a codec can say
    <parameter>.delta     w + delta    of the parameter's shape
    <parameter>.lora_a    w + b @ a    a: (rank, inputs), b: (outputs, rank)
    <parameter>.lora_b

in this order. Taking off copies the originals back, so every bit is as it was.
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

_WAYS = ("scale", "gain", "delta", "lora_a", "lora_b")


def check_adapter(backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` unless every tensor fits a parameter."""
    for name, ways in _by_parameter(tensors).items():
        parameter = backbone.named_tensors().get(name)
        if parameter is None:
            raise InvalidPackError(
                f"the adapter tunes {name}, which the backbone does not have",
                code="E_ADAPTER",
                hint="it was made for another backbone",
            )
        shape = parameter.shape
        wide = parameter[0].numel() if parameter.ndim > 1 else 1
        for way, tensor in ways.items():
            got = tuple(tensor.shape)
            fits = {
                "scale": tensor.numel() == 1 or got == tuple(shape[:1]),
                "gain": tensor.numel() == 1 or got == tuple(shape[:1]),
                "delta": got == tuple(shape),
                "lora_a": tensor.ndim == 2 and got[1] == wide,
                "lora_b": tensor.ndim == 2 and got[0] == shape[0],
            }
            if not fits[way]:
                raise InvalidPackError(
                    f"{name}.{way} of shape {got} does not fit {tuple(shape)}", code="E_ADAPTER"
                )
        pair = [ways.get(way) for way in ("lora_a", "lora_b")]
        if (pair[0] is None) != (pair[1] is None) or (
            pair[0] is not None and pair[1] is not None and len(pair[0]) != pair[1].shape[1]
        ):
            raise InvalidPackError(
                f"the low-rank factors of {name} do not belong together", code="E_ADAPTER"
            )


@contextmanager
def apply_adapter(backbone: Backbone, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The backbone with these tensors put on, for the length of a `with`."""
    if not tensors:
        yield
        return
    named = backbone.named_tensors()
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, ways in _by_parameter(tensors).items():
                weight = named[name].data
                saved.append((weight, weight.clone()))
                weight.copy_(_tuned(weight, ways))
        backbone.changed()
        yield
    finally:
        with torch.no_grad():
            for weight, original in saved:
                weight.copy_(original)
        backbone.changed()


def _tuned(weight: Tensor, ways: Mapping[str, Tensor]) -> Tensor:
    wide = weight.float()
    put = {way: tensor.to(wide) for way, tensor in ways.items()}
    if (scale := put.get("scale")) is not None:
        wide = wide * (scale.reshape(-1, *(1,) * (wide.ndim - 1)) if wide.ndim else scale)
    if (gain := put.get("gain")) is not None:
        wide = wide * (1 + (gain.reshape(-1, *(1,) * (wide.ndim - 1)) if wide.ndim else gain))
    if (delta := put.get("delta")) is not None:
        wide = wide + delta
    if "lora_a" in put:
        wide = wide + (put["lora_b"] @ put["lora_a"]).reshape(wide.shape)
    return wide


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, way = name.rpartition(".")
        if way not in _WAYS:
            raise InvalidPackError(
                f"{name} does not end in one of .{', .'.join(_WAYS)}", code="E_ADAPTER"
            )
        found.setdefault(parameter, {})[way] = tensor
    return found
