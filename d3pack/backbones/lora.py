"""LoRA files as adapters: names of diffusers, peft and kohya become those of parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.backbones.adapter import check_adapter
from d3pack.errors import InvalidPackError, NotFoundError, UsageError

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
_LAYER = re.compile(r"[\w.]+")
_PEFT = "base_model.model."  # before each name in the files of peft itself
_CONFIG, _MOST = "adapter_config.json", 1 << 20  # most bytes of it
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of peft


def read_lora(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    """Return the tensors of an adapter from a LoRA of the denoiser, in safetensors.

    The weight of each layer, alpha / rank, is in its second factor. Files of peft itself keep alpha
    in the `adapter_config.json` beside them.

    Raises:
        NotFoundError: there is no file.
        UsageError: the file is not such a LoRA, or was made for another backbone.
    """
    if not path.exists():
        raise NotFoundError(f"there is no file {path}", hint="give a LoRA in safetensors")
    layers: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, Any] = {}
    own = False
    for name, tensor in _read(path, metadata):
        match = _NAME.fullmatch(name)
        if name.startswith(("text_encoder", "lora_te")):
            raise UsageError(f"{path}: {name} tunes a text encoder, an adapter tunes the denoiser")
        if match is None:
            raise UsageError(f"{path}: {name} is not part of a plain LoRA")
        parts = layers.setdefault(match["layer"], {})
        part = _PARTS.get(match["part"], "alpha")
        if part in parts:
            raise UsageError(f"{path} names a tensor of {match['layer']} twice")
        parts[part] = tensor
        own = own or name.startswith(_PEFT)
    if not layers:
        raise UsageError(f"{path} holds no tensors")
    if own and not all("alpha" in parts for parts in layers.values()):
        metadata = _config(path.with_name(_CONFIG))
    known = _layers_of(backbone)
    adapter: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        model = _MODEL.match(layer)
        parameter = known.get(_plain(layer[model.end() :] if model else layer))
        if parameter is None:
            raise UsageError(f"{path} was made for another backbone: this one has no layer {layer}")
        if f"{parameter}.lora_a" in adapter:
            raise UsageError(f"{path} tunes {parameter} twice, under two names")
        settings = metadata if own else _settings_of(layer, metadata)
        try:
            a, b = _factors(layer, parts, settings)
        except UsageError as error:
            raise UsageError(f"{path}: {error.args[0]}") from None
        adapter[f"{parameter}.lora_a"], adapter[f"{parameter}.lora_b"] = a, b
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
        if not path.is_file():
            raise OSError
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA, "{}")
            metadata.update(_object(text, f"the {_METADATA} of {path}"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
                    raise UsageError(f"{path}: {name} holds values that are not finite numbers")
                yield name, tensor.float()
    except (SafetensorError, OSError):
        raise UsageError(
            f"{path} is not a safetensors file", hint="pickles can run code and are refused"
        ) from None


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{what} is not a JSON object")
    return value


def _config(path: Path) -> dict[str, Any]:
    """Return the settings that peft keeps beside its file."""
    try:
        if not path.is_file():
            raise OSError
        with path.open("rb") as file:
            settings = _object(file.read(_MOST), str(path))
    except OSError:
        raise UsageError(
            f"{path.parent} holds a LoRA of peft without its {_CONFIG}, which tells alpha",
            hint="put both files into one folder",
        ) from None
    if settings.get("peft_type", "LORA") != "LORA":
        raise UsageError(f"{path} is not of a LoRA, but of {settings['peft_type']!r:.40}")
    if "lora_alpha" not in settings:
        raise UsageError(f"{path} tells no lora_alpha")
    return settings


def _settings_of(layer: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what diffusers writes of one model into its file."""
    model = f"{layer.partition('.')[0]}."
    return {k.removeprefix(model): v for k, v in metadata.items() if k.startswith(model)}


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


def _factors(
    layer: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return both factors as matrices, the second times the weight of the layer."""
    if not {"a", "b"} <= parts.keys():
        raise UsageError(f"{layer} lacks one of its two factors")
    if min(parts["a"].ndim, parts["b"].ndim) < 2 or not parts["a"].numel():
        raise UsageError(f"the factors of {layer} are not matrices of rank 1 or more")
    a, b = parts["a"].flatten(1), parts["b"].flatten(1)
    b = b * _weight(layer, parts, len(a), settings)
    if not b.isfinite().all():
        raise UsageError(f"the alpha of {layer} is too large")
    return a, b


def _weight(
    layer: str, parts: Mapping[str, Tensor], rank: int, settings: Mapping[str, Any]
) -> float:
    """Return alpha / rank; 1 where a file has no alpha."""
    if settings.get("use_dora"):
        raise UsageError("a LoRA with use_dora is not a plain LoRA")
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise UsageError(f"the alpha of {layer} has {parts['alpha'].numel()} values")
        return parts["alpha"].item() / rank
    told = settings.get("r", rank)
    if told != rank and not settings.get("rank_pattern"):
        raise UsageError(f"{layer} has rank {rank}, its settings say {told!r:.40}")
    alpha = _alpha(layer, settings, rank)
    try:
        if isinstance(alpha, bool) or not math.isfinite(alpha):
            raise TypeError
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, OverflowError):
        shown = f"{alpha!r:.40}" if isinstance(alpha, float | str) else type(alpha).__name__
        raise UsageError(f"the alpha of {layer} is {shown}, not a finite number") from None


def _alpha(layer: str, settings: Mapping[str, Any], rank: int) -> Any:
    """Return the alpha of a layer: of the first pattern that its name ends in, else of all."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UsageError(f"alpha_pattern is a {type(patterns).__name__}, not an object")
    model = _MODEL.match(layer)
    names = {layer, layer[model.end() :] if model else layer}
    for pattern, alpha in patterns.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _LAYER.fullmatch(plain):
            raise UsageError(f"alpha_pattern holds {pattern!r:.80}, which is not a layer's name")
        if plain in names or (pattern[0] != "^" and layer.endswith(f".{plain}")):
            return alpha
    return settings.get("lora_alpha", rank)
