"""LoRA files as adapters: names of diffusers, peft and kohya become those of parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.backbones.adapter import check_adapter
from d3pack.errors import InvalidPackError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones.protocol import Backbone

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+?)(?:_lora|\.lora)?[._]"
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(?:\.default)?(?:\.weight)?"
)
_PARTS = {"lora_A": "a", "lora_down": "a", "down": "a", "lora_B": "b", "lora_up": "b", "up": "b"}
_MODEL = re.compile(r"((unet|transformer|diffusion_model)\.|lora_(unet|transformer)_)")
# names that the original code of Stable Diffusion XL gives to attention
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)(?:_(\d+))?_1_")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of peft


def read_lora(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    """Return the tensors of an adapter from a LoRA of the denoiser, in safetensors.

    The weight of each layer, alpha / rank, is in its second factor.

    Raises:
        UsageError: the file is not such a LoRA, or was made for another backbone.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, Any] = {}
    for name, tensor in _read(path, metadata):
        match = _NAME.fullmatch(name)
        if name.startswith(("text_encoder", "lora_te")):
            raise UsageError(f"{path}: {name} tunes a text encoder, an adapter tunes the denoiser")
        if match is None:
            raise UsageError(f"{path}: {name} is not part of a plain LoRA")
        part = _PARTS.get(match["part"], "alpha")
        layers.setdefault(match["layer"], {})[part] = tensor
    if not layers:
        raise UsageError(f"{path} holds no tensors")
    known = _layers_of(backbone)
    adapter: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        model = _MODEL.match(layer)
        parameter = known.get(_plain(layer[model.end() :] if model else layer))
        if parameter is None:
            raise UsageError(f"{path} was made for another backbone: this one has no layer {layer}")
        if not {"a", "b"} <= parts.keys():
            raise UsageError(f"{path}: {layer} lacks one of its two factors")
        a, b = parts["a"].flatten(1), parts["b"].flatten(1)
        adapter[f"{parameter}.lora_a"] = a
        adapter[f"{parameter}.lora_b"] = b * _weight(layer, parts, len(a), metadata)
    try:
        check_adapter(backbone, adapter)
    except InvalidPackError as error:
        raise UsageError(f"{path} was made for another backbone: {error.args[0]}") from None
    return adapter


def _read(path: Path, metadata: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file in float32, and fill in what it says of its settings."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            with suppress(ValueError, TypeError, RecursionError):
                metadata.update(json.loads((file.metadata() or {}).get(_METADATA, "{}")))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
                    raise UsageError(f"{path}: {name} holds values that are not finite numbers")
                yield name, tensor.float()
    except (SafetensorError, OSError):
        raise UsageError(
            f"{path} is not a safetensors file", hint="pickles can run code and are refused"
        ) from None


def _layers_of(backbone: Backbone) -> dict[str, str]:
    """Return the parameters that a LoRA can tune, by the plain name of their layer."""
    names = [name for name, p in backbone.named_tensors().items() if p.ndim > 1]
    return {_plain(name.removesuffix(".weight")): name for name in names}


def _plain(layer: str) -> str:
    """Return a layer's name as all formats spell it alike."""
    plain = layer.replace(".processor.", ".").replace(".", "_")
    plain = _ORIGINAL.sub(_current, plain)
    return plain[:-2] if plain.endswith("to_out_0") else plain


def _current(match: re.Match[str]) -> str:
    """Return diffusers' name for a block with attention."""
    if match[1] == "middle_block":
        return "mid_block_attentions_0_"
    number = int(match[2] or 0) - (match[1] == "input_blocks")
    side = "down" if match[1] == "input_blocks" else "up"
    return f"{side}_blocks_{number // 3}_attentions_{number % 3}_"


def _weight(layer: str, parts: Mapping[str, Tensor], rank: int, metadata: Mapping[str, Any]) -> Any:
    """Return alpha / rank; 1 where a file has no alpha."""
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    model, _, rest = layer.partition(".")
    own = metadata.get(f"{model}.alpha_pattern") or {}
    alpha = own.get(rest, metadata.get(f"{model}.lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UsageError(f"the alpha of {layer} is {alpha!r:.40}, not a number")
    return alpha / (math.sqrt(rank) if metadata.get(f"{model}.use_rslora") else rank)
