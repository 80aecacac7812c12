"""From verified files to models: configs are distrusted, tensors counted before they are read."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.backbones.layout import weight_files
from d3pack.backbones.lock import Checked, changed
from d3pack.errors import BackboneError
from d3pack.system import first_line

if TYPE_CHECKING:
    import torch

# the only classes ever built, whatever a config says
CLASSES = {
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "DiTTransformer2DModel": "diffusers.models.transformers.dit_transformer_2d",
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "AutoencoderTiny": "diffusers.models.autoencoders.autoencoder_tiny",
    "CLIPTextModel": "transformers.models.clip.modeling_clip",
}
_FLOATS = ("F32", "F16", "BF16")
_MOST = 1 << 20  # vocabularies; anything else is far below
_MOST_BY_NAME = {
    "num_layers": 256,
    "num_hidden_layers": 256,
    "layers_per_block": 32,
    "transformer_layers_per_block": 64,
    "num_encoder_blocks": 32,
    "num_decoder_blocks": 32,
    "sample_size": 1024,
    "max_position_embeddings": 4096,
    "num_train_timesteps": 100_000,
}
_CHANNELS = 1 << 15  # any width: channels, heads, hidden sizes
_LIST = 64
# products; SDXL's UNet has 60 layers by this count, a DiT-XL/2 for 512 px 1.2 million values
_MOST_LAYERS = 512
_MOST_POSITIONS = 1 << 24


class Files:
    """The verified files of one backbone, and the only way to read them."""

    def __init__(
        self, paths: Mapping[str, Path], checked: Mapping[str, Checked] | None = None
    ) -> None:
        self._paths = dict(paths)
        self._checked = dict(checked or {})  # none: the files of a directory that has no lock

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def read(self, path: str) -> bytes:
        """All bytes of a small file."""
        if path not in self._paths:
            raise BackboneError(
                f"{path} is not among the locked files",
                code="E_BACKBONE_MISSING",
                hint="lock the backbone again",
            )
        data = self._paths[path].read_bytes()
        known = self._checked.get(path)
        if known and hashlib.sha256(data).hexdigest() != known.sha256:
            raise changed(path, "it was written to after it was checked")
        return data

    def json(self, path: str) -> dict[str, Any]:
        """A JSON object."""
        try:
            value = json.loads(self.read(path))
        except (ValueError, RecursionError):
            raise BackboneError(f"{path} is not JSON", code="E_BACKBONE_CONFIG") from None
        if not isinstance(value, dict):
            raise BackboneError(f"{path} is not a JSON object", code="E_BACKBONE_CONFIG")
        return value

    def weights(self, stem: str) -> tuple[Path, ...]:
        """The safetensors files of one part."""
        found = tuple(self._paths[path] for path in weight_files(self._paths, stem))
        if not found:
            raise BackboneError(
                f"no weights for {stem} among the locked files", code="E_BACKBONE_MISSING"
            )
        return found

    def confirm(self, stem: str) -> None:
        """Raise if weights that have been read were written to since they were checked."""
        for path in weight_files(self._paths, stem):
            known = self._checked.get(path)
            if known and not known.unchanged():
                raise changed(path, "it was written to after it was checked")


def build(
    files: Files,
    folder: str,
    stem: str,
    allowed: tuple[str, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """One model of a known class, with exactly the weights that its config asks for."""
    from d3pack.backbones.cpu import quicken

    path = f"{folder}/config.json"
    config = files.json(path)
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    if not isinstance(name, str):
        raise BackboneError(f"{path} names no model class", code="E_BACKBONE_CONFIG")
    if name not in allowed or name not in CLASSES:
        raise BackboneError(
            f"{path} asks for {name!r}, which is not one of {', '.join(allowed)}",
            code="E_BACKBONE_CONFIG",
        )
    check_config(path, config)
    cls = getattr(import_module(CLASSES[name]), name)
    _check_products(path, cls, config)
    with _without_weights():
        model = _construct(path, cls, config)
    wanted = dict(model.state_dict())
    state = _read(files.weights(f"{folder}/{stem}"), folder, wanted, dtype)
    files.confirm(f"{folder}/{stem}")
    model.load_state_dict(state, assign=True, strict=False)  # `_read` was the strict one
    model = model.eval().requires_grad_(False).to(device)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():  # anew: other data in the old one would not compile
                setattr(module, key, buffer.to(dtype))
    if device.type == "cpu":
        quicken(model)
    return model


@contextmanager
def _without_weights() -> Iterator[None]:
    """Put the parameters of modules made here on the meta device; buffers keep their values."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    thread = threading.get_ident()  # the hook is global; other threads keep their parameters

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation lacks the parameter that such a hook may return
    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def check_config(path: str, config: Mapping[str, Any]) -> None:
    """Refuse numbers that no real model has, before anything is allocated for them."""
    for key, value in config.items():
        if key.startswith("_") or key in ("id2label", "label2id"):
            continue
        for item in _numbers(path, key, value):
            limit = _MOST_BY_NAME.get(key, _MOST if key == "vocab_size" else _CHANNELS)
            whole = isinstance(item, int) and not isinstance(item, bool)
            if (whole and item < -1) or (isinstance(item, int | float) and not item <= limit):
                if key.endswith("token_id") and 0 <= item <= _MOST:
                    continue
                raise BackboneError(
                    f"{path} asks for {key} = {item}, more than {limit}",
                    code="E_BACKBONE_CONFIG",
                    hint="this is no config of a real model",
                )


def _check_products(path: str, cls: Any, config: Mapping[str, Any]) -> None:
    """The same for numbers that multiply; those that a config leaves out are the class's own."""
    given = {key: p.default for key, p in inspect.signature(cls).parameters.items()} | {**config}

    def most(*keys: str) -> int:
        found = [n for key in keys for n in _numbers(path, key, given.get(key))]
        return max([1, *(math.ceil(n) for n in found if isinstance(n, int | float))])

    blocks = given.get("block_out_channels") or given.get("decoder_block_out_channels")
    depth = len(blocks) if isinstance(blocks, list | tuple) else 1
    layers = most("layers_per_block", "num_encoder_blocks", "num_decoder_blocks")
    inner = most("transformer_layers_per_block", "reverse_transformer_layers_per_block")
    side = most("sample_size") // most("patch_size")
    width = most("num_attention_heads") * most("attention_head_dim")
    # a transformer's positions are computed at once; all else has only shapes until it is read
    positions = side**2 * width if "patch_size" in given else 0
    for what, asked, limit in (
        ("layers", depth * layers * inner, _MOST_LAYERS),
        ("values of its positions", positions, _MOST_POSITIONS),
    ):
        if asked > limit:
            raise BackboneError(
                f"{path} asks for {asked} {what}, more than {limit}",
                code="E_BACKBONE_CONFIG",
                hint="this is no config of a real model",
            )


def number(path: str, config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number out of a config, or its default where it says null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BackboneError(f"{path}: {key} is {value!r}, not a number", code="E_BACKBONE_CONFIG")
    return float(value)


def _numbers(path: str, key: str, value: Any) -> list[Any]:
    flat = [value]
    for _ in range(3):
        if any(isinstance(v, list) and len(v) > _LIST for v in flat):
            raise BackboneError(f"{path}: the list {key} is too long", code="E_BACKBONE_CONFIG")
        flat = [w for v in flat for w in (v if isinstance(v, list) else [v])]
    return flat


def _construct(path: str, cls: Any, config: Mapping[str, Any]) -> Any:
    """Any failure of the library to build from a stranger's config is the config's failure."""
    try:
        if cls.__name__ == "CLIPTextModel":
            from transformers.models.clip.configuration_clip import CLIPTextConfig

            known = {k: v for k, v in config.items() if not k.startswith("_") and k in _CLIP}
            return cls(CLIPTextConfig(**known))
        known = {k: v for k, v in config.items() if k in inspect.signature(cls).parameters}
        return cls(**known)
    except Exception as error:
        reason = first_line(error)
        raise BackboneError(
            f"{path} does not describe a {cls.__name__}: {reason}", code="E_BACKBONE_CONFIG"
        ) from None


_CLIP = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _read(
    paths: tuple[Path, ...], folder: str, wanted: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import SafetensorError, safe_open

    state: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - not a mapping
                    if stored.endswith("position_ids"):  # a constant that old files carry
                        continue
                    name = _current_name(stored, wanted)
                    part = file.get_slice(stored)
                    _check_tensor(folder, name, part.get_dtype(), part.get_shape(), wanted)
                    # a copy of its own: aligned like every tensor, and free of the file
                    state[name] = file.get_tensor(stored).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise BackboneError(
                f"{folder}/{path.name} cannot be read: {error}", code="E_BACKBONE_WEIGHTS"
            ) from None
    for name in wanted:
        if name not in state and not name.endswith("position_ids"):
            raise BackboneError(
                f"{folder} has no tensor {name}",
                code="E_BACKBONE_WEIGHTS",
                hint="weights and config do not belong together",
            )
    for name, tensor in state.items():
        # a sum carries any NaN or infinity, in one pass and without a mask of its size
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise BackboneError(
                f"{folder}: {name} holds values that are not finite", code="E_BACKBONE_WEIGHTS"
            )
    return state


def _current_name(stored: str, wanted: Mapping[str, torch.Tensor]) -> str:
    """Names as the installed libraries use them; both sides have renamed theirs over the years."""
    if stored in wanted:
        return stored
    bare = stored.removeprefix("text_model.")
    parts = stored.split(".")
    if len(parts) > 1 and parts[-2] in _RENAMED:
        parts[-2] = _RENAMED[parts[-2]]
    for candidate in (bare, f"text_model.{stored}", ".".join(parts)):
        if candidate in wanted:
            return candidate
    return stored


def _check_tensor(
    folder: str, name: str, dtype: str, shape: list[int], wanted: Mapping[str, torch.Tensor]
) -> None:
    if name not in wanted:
        raise BackboneError(
            f"{folder} has a tensor {name} that its config does not ask for",
            code="E_BACKBONE_WEIGHTS",
            hint="weights and config do not belong together",
        )
    if dtype not in _FLOATS:
        raise BackboneError(
            f"{folder}: {name} is {dtype}, not one of {', '.join(_FLOATS)}",
            code="E_BACKBONE_WEIGHTS",
        )
    if tuple(shape) != tuple(wanted[name].shape):
        raise BackboneError(
            f"{folder}: {name} has shape {tuple(shape)}, not {tuple(wanted[name].shape)}",
            code="E_BACKBONE_WEIGHTS",
            hint="weights and config do not belong together",
        )
