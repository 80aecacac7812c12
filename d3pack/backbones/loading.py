"""From verified files to models: configs are bounded, and tensors checked before they are read."""

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

from d3pack.backbones.kernels import optimize_for_cpu
from d3pack.backbones.lock import VerifiedFile, changed, weight_files
from d3pack.backbones.models import unet
from d3pack.errors import BackboneError
from d3pack.system import first_line

if TYPE_CHECKING:
    import torch

# the only classes that are ever built, whatever a config says
CLASSES = {
    "CLIPTextModelWithProjection": "d3pack.backbones.models.clip",
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "DiTTransformer2DModel": "diffusers.models.transformers.dit_transformer_2d",
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "AutoencoderTiny": "d3pack.backbones.models.autoencoder_tiny",
    "AutoencoderDC": "diffusers.models.autoencoders.autoencoder_dc",
    "AutoencoderKLFlux2": "diffusers.models.autoencoders.autoencoder_kl_flux2",
    "PRXTransformer2DModel": "diffusers.models.transformers.transformer_prx",
    "ZImageTransformer2DModel": "diffusers.models.transformers.transformer_z_image",
    "Flux2Transformer2DModel": "diffusers.models.transformers.transformer_flux2",
    "SanaTransformer2DModel": "diffusers.models.transformers.sana_transformer",
    "CLIPTextModel": "d3pack.backbones.models.clip",
    "Gemma2Model": "transformers.models.gemma2.modeling_gemma2",
    "Qwen3Model": "transformers.models.qwen3.modeling_qwen3",
    "T5GemmaEncoder": "transformers.models.t5gemma.modeling_t5gemma",
}
# the part of a class that we use
_INNER = {
    "Gemma2ForCausalLM": "Gemma2Model",
    "Qwen3ForCausalLM": "Qwen3Model",
    "T5GemmaEncoderModel": "T5GemmaEncoder",
}
MAX_FILE = 1 << 26  # bytes of a tokenizer; Gemma's tokenizer.json has 34 MB
MAX_CONFIG = 1 << 20  # bytes of every other JSON; model_index.json of DiT has 33 kB
# commas and opening brackets, each of which may become an object; Gemma's tokenizer.json has two
# million
MAX_MARKS = 3_000_000
_FLOATS = ("F32", "F16", "BF16")
_MAX_WORDS = 1 << 20  # of a vocabulary
_MAX_WIDTH = 1 << 15  # of anything else: channels, heads, hidden sizes
_MAX_BY_NAME = {
    "vocab_size": _MAX_WORDS,
    "num_layers": 256,
    "num_hidden_layers": 256,
    "depth": 256,
    "n_layers": 256,
    "n_refiner_layers": 256,
    "num_single_layers": 256,
    "layers_per_block": 32,
    "encoder_layers_per_block": 32,
    "decoder_layers_per_block": 32,
    "transformer_layers_per_block": 64,
    "num_encoder_blocks": 32,
    "num_decoder_blocks": 32,
    "sample_size": 1024,
    "max_position_embeddings": 1 << 18,
    "num_train_timesteps": 100_000,
    "rope_theta": 1 << 24,
}
_MAX_LIST = 64
_MAX_NUMBER = 1e18  # of numbers that are read one by one
# products; SDXL's UNet has 60 layers by this count, a DiT-XL/2 for 512 px 1.2 million values
_MAX_LAYERS = 512
_MAX_POSITIONS = 1 << 24
_MAX_TOKENS = 512  # that CLIP reads, with a mask of their square; real ones read 77
_REAL_MODEL_HINT = "this is not the config of a real model"
_MISMATCH_HINT = "weights and config do not belong together"
_LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_theta",
    "rope_parameters",
    "pad_token_id",
)
# tensors that nothing reads: a constant in old files, a counter, the output of a language model
_UNUSED = ("position_ids", "num_batches_tracked", "lm_head.weight")
_PREFIXES = ("text_model.", "model.", "encoder.")  # of a model around the one that we build
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Files:
    """The verified files of one backbone, and the only way to read them.

    Args:
        paths: where each file is, by its name in the lock.
        verified: how each was verified; left out for a directory that has no lock.
    """

    def __init__(
        self, paths: Mapping[str, Path], verified: Mapping[str, VerifiedFile] | None = None
    ) -> None:
        self._paths = dict(paths)
        self._verified = dict(verified or {})

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def read(self, path: str) -> bytes:
        """Return the bytes of a small file."""
        if path not in self._paths:
            raise BackboneError(
                f"{path} is not among the locked files",
                code="E_BACKBONE_MISSING",
                hint="lock the backbone again",
            )
        with self._paths[path].open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise config_error(f"{path} has more than {MAX_FILE} bytes")
        known = self._verified.get(path)
        if known and hashlib.sha256(data).hexdigest() != known.sha256:
            raise changed(path, "it was written to after it was checked")
        return data

    def json(self, path: str) -> dict[str, Any]:
        """Return a JSON object, which is not many times as large as its text."""
        data = self.read(path)
        if not path.startswith("tokenizer") and len(data) > MAX_CONFIG:
            raise config_error(f"{path} has more than {MAX_CONFIG} bytes")
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_MARKS:
            raise config_error(f"{path} has more than {MAX_MARKS} values")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise config_error(f"{path} is not JSON") from None
        if not isinstance(value, dict):
            raise config_error(f"{path} is not a JSON object")
        return value

    def weights(self, stem: str) -> tuple[Path, ...]:
        """Return the safetensors files of one part."""
        paths = tuple(self._paths[path] for path in weight_files(self._paths, stem))
        if not paths:
            raise BackboneError(
                f"no weights for {stem} among the locked files", code="E_BACKBONE_MISSING"
            )
        return paths

    def confirm(self, stem: str) -> None:
        """Raise if weights that have been read were written to since they were verified."""
        for path in weight_files(self._paths, stem):
            known = self._verified.get(path)
            if known and not known.is_unchanged():
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
    """Return one model of an allowed class, with exactly the weights that its config asks for.

    Args:
        files: of the backbone.
        folder: of the model, with its config.json.
        stem: name of the weights file, without variant and suffix.
        allowed: class names, keys of `CLASSES`.
        device: where the model runs.
        dtype: of its parameters and buffers.
    """
    path = f"{folder}/config.json"
    config = files.json(path)
    name = _class_name(path, config, allowed)
    check_config(path, config)
    own = name == "UNet2DConditionModel" and unet.can_build(config)
    cls = getattr(unet if own else import_module(CLASSES[name]), name)
    _check_products(path, cls, config)
    with _without_weights():
        model = _construct(path, cls, config)
    expected = dict(model.state_dict())
    state = _read_weights(files.weights(f"{folder}/{stem}"), folder, expected, dtype)
    files.confirm(f"{folder}/{stem}")
    # not strict: `_read_weights` has compared the names
    model.load_state_dict(state, assign=True, strict=False)
    model = model.eval().requires_grad_(False).to(device)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key.endswith("inv_freq"):  # of rotary positions, which bfloat16 could not tell apart
                continue
            if buffer.is_floating_point():  # a new tensor: changed in place it would not compile
                setattr(module, key, buffer.to(dtype))
    if device.type == "cpu":
        optimize_for_cpu(model)
    return model


def _class_name(path: str, config: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    name = config.get("_class_name") or first
    if not isinstance(name, str):
        raise config_error(f"{path} names no model class")
    name = _INNER.get(name, name)
    if name not in allowed or name not in CLASSES:
        raise config_error(f"{path} asks for {name!r}, which is not one of {', '.join(allowed)}")
    return name


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
    if isinstance(config.get("encoder"), dict):  # of a model of two halves
        check_config(path, config["encoder"])
    for key, value in config.items():
        if key.startswith("_") or key in ("id2label", "label2id"):
            continue
        limit = _MAX_BY_NAME.get(key, _MAX_WORDS if key.endswith("token_id") else _MAX_WIDTH)
        for item in _numbers(path, key, value):
            is_int = isinstance(item, int) and not isinstance(item, bool)
            if (is_int and item < -1) or (isinstance(item, int | float) and not item <= limit):
                raise config_error(
                    f"{path} asks for {key} = {item}, more than {limit}", hint=_REAL_MODEL_HINT
                )


def _check_products(path: str, cls: Any, config: Mapping[str, Any]) -> None:
    """Refuse numbers whose product no real model has; missing ones are the class's defaults."""
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    values = {**defaults, **config}

    def largest(*keys: str) -> int:
        numbers = [n for key in keys for n in _numbers(path, key, values.get(key))]
        return max([1, *(math.ceil(n) for n in numbers if isinstance(n, int | float))])

    blocks = values.get("block_out_channels") or values.get("decoder_block_out_channels")
    depth = len(blocks) if isinstance(blocks, list | tuple) else 1
    layers = largest("layers_per_block", "num_encoder_blocks", "num_decoder_blocks")
    inner = largest("transformer_layers_per_block", "reverse_transformer_layers_per_block")
    side = largest("sample_size") // largest("patch_size")
    width = largest("num_attention_heads") * largest("attention_head_dim")
    # only a transformer's positions are allocated before the weights are read
    positions = side**2 * width if "patch_size" in values else 0
    tokens = largest("max_position_embeddings") if cls.__name__.startswith("CLIP") else 0
    for what, number, limit in (
        ("layers", depth * layers * inner, _MAX_LAYERS),
        ("values of its positions", positions, _MAX_POSITIONS),
        ("tokens of a text", tokens, _MAX_TOKENS),
    ):
        if number > limit:
            raise config_error(
                f"{path} asks for {number} {what}, more than {limit}", hint=_REAL_MODEL_HINT
            )


def number(path: str, config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of a config, or the default where it is missing or null."""
    value = config.get(key)
    if value is None:
        return float(default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _MAX_NUMBER:  # NaN is not
        raise config_error(f"{path}: {key} is {value!r:.40}, not a number of a real model")
    return float(value)


def config_error(message: str, hint: str = "") -> BackboneError:
    """Return the error for a config or tokenizer that is not accepted."""
    return BackboneError(message, code="E_BACKBONE_CONFIG", hint=hint)


def _numbers(path: str, key: str, value: Any) -> list[Any]:
    """Return the items of a value, of lists, and of lists in lists."""
    items = [value]
    for _ in range(3):
        if any(isinstance(item, list) and len(item) > _MAX_LIST for item in items):
            raise config_error(f"{path}: the list {key} is too long")
        items = [inner for item in items for inner in (item if isinstance(item, list) else [item])]
    return items


def _construct(path: str, cls: Any, config: Mapping[str, Any]) -> Any:
    """Return a model without weights; any failure of the library is blamed on the config."""
    try:
        if cls.__module__.startswith("transformers."):
            return cls(_language_config(cls.__name__, config))
        taken = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in config.items() if key in taken})
    except Exception as error:
        raise config_error(
            f"{path} does not describe a {cls.__name__}: {first_line(error)}"
        ) from None


def _language_config(name: str, config: Mapping[str, Any]) -> Any:
    """Return the configuration of a language model; the one of T5Gemma may hold two."""
    inner = config.get("encoder", config)
    fields = {key: value for key, value in inner.items() if key in _LANGUAGE_FIELDS}
    if name == "Qwen3Model":
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

        return Qwen3Config(**fields)
    if name == "Gemma2Model":
        from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

        return Gemma2Config(**fields)
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig

    return T5GemmaConfig(encoder=fields, decoder=fields).encoder


def _read_weights(
    paths: tuple[Path, ...], folder: str, expected: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return tensors of exactly the expected names and shapes, all of them finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    state: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - not a mapping
                    if stored.endswith(_UNUSED):
                        continue
                    name = _current_name(stored, expected)
                    part = file.get_slice(stored)
                    _check_tensor(folder, name, part.get_dtype(), part.get_shape(), expected)
                    # a copy: aligned like every tensor, and independent of the file
                    state[name] = file.get_tensor(stored).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise _weights_error(f"{folder}/{path.name} cannot be read: {error}") from None
    for name in expected:
        if name not in state and not name.endswith(_UNUSED):
            raise _weights_error(f"{folder} has no tensor {name}", hint=_MISMATCH_HINT)
    for name, tensor in state.items():
        # a sum is NaN or infinite if any value is, in one pass and without a mask of its size
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise _weights_error(f"{folder}: {name} holds values that are not finite")
    return state


def _current_name(stored: str, expected: Mapping[str, torch.Tensor]) -> str:
    """Return the name that the installed libraries use; both have renamed tensors before."""
    if stored in expected:
        return stored
    parts = stored.split(".")
    if len(parts) > 1 and parts[-2] in _RENAMED:
        parts[-2] = _RENAMED[parts[-2]]
    bare = [stored.removeprefix(prefix) for prefix in _PREFIXES]
    for candidate in (*bare, f"text_model.{stored}", ".".join(parts)):
        if candidate in expected:
            return candidate
    return stored


def _check_tensor(
    folder: str, name: str, dtype: str, shape: list[int], expected: Mapping[str, torch.Tensor]
) -> None:
    if name not in expected:
        raise _weights_error(
            f"{folder} has a tensor {name} that its config does not ask for", hint=_MISMATCH_HINT
        )
    if dtype not in _FLOATS:
        raise _weights_error(f"{folder}: {name} is {dtype}, not one of {', '.join(_FLOATS)}")
    if tuple(shape) != tuple(expected[name].shape):
        raise _weights_error(
            f"{folder}: {name} has shape {tuple(shape)}, not {tuple(expected[name].shape)}",
            hint=_MISMATCH_HINT,
        )


def _weights_error(message: str, hint: str = "") -> BackboneError:
    return BackboneError(message, code="E_BACKBONE_WEIGHTS", hint=hint)
