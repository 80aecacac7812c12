"""Weights, configurations and tokenizers that lie: each is refused, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from full_backbones import DIT, VAE
from full_backbones import UNET as SD
from safetensors.torch import load_file, save_file

from d3pack.backbones import loading, open_backbone
from d3pack.testing import raises_code

SDXL: dict[str, Any] = {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
}
UNET = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
FLOW = "FlowMatchEulerDiscreteScheduler"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bad_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        state = load_file(root / UNET)
        change(state)
        save_file(state, root / UNET)

    return apply


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return bad_weights(lambda state: state.update({name: value(state[name])}))


def poke(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[3] = number
        return tensor

    return change


def cut(root: Path) -> None:
    (root / UNET).write_bytes((root / UNET).read_bytes()[:-100])


def wide_header(root: Path) -> None:
    data = (root / UNET).read_bytes()
    (root / UNET).write_bytes((2**60).to_bytes(8, "little") + data[8:])


WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (put("conv_in.weight", poke(float("nan"))), "not finite"),
    "infinite": (put("conv_out.bias", poke(float("inf"))), "not finite"),
    "integers": (put("conv_in.bias", lambda t: t.to(torch.int64)), "is I64"),
    "doubles": (put("conv_in.bias", lambda t: t.to(torch.float64)), "is F64"),
    "float8": (put("conv_in.bias", lambda t: t.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    "misshapen": (put("conv_in.weight", lambda t: t[:, :3].contiguous()), "has shape"),
    "left over": (bad_weights(lambda s: s.update(more=torch.zeros(1))), "does not ask for"),
    "missing": (bad_weights(lambda s: s.pop("conv_in.bias")), "no tensor conv_in.bias"),
    "cut off": (cut, "cannot be read"),
    "header beyond the file": (wide_header, "cannot be read"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_invalid_weights_are_refused(case: str, sd: Path) -> None:
    spoil, why = WEIGHTS[case]
    spoil(sd)
    with raises_code("E_BACKBONE_WEIGHTS", match=why):
        open_backbone(str(sd))


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown class": ("unet/config.json", {"_class_name": "MyUNet"}, "MyUNet"),
    "class of another part": ("vae/config.json", {"_class_name": "UNet2DConditionModel"}, "UNet"),
    "no class": ("unet/config.json", {"_class_name": None}, "names no model class"),
    "remote code": ("unet/config.json", {"_class_name": "os.system"}, "os.system"),
    "other text encoder": ("text_encoder/config.json", {"architectures": ["T5"]}, "T5"),
    "10^9 channels": ("unet/config.json", {"block_out_channels": [10**9, 64]}, "1000000000"),
    "10^9 in channels": ("vae/config.json", {"latent_channels": 10**9}, "latent_channels"),
    "10^9 layers": ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden"),
    "10^9 words": ("text_encoder/config.json", {"vocab_size": 10**9}, "vocab_size"),
    "10^9 positions": ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_pos"),
    "10^3 positions": (
        "text_encoder/config.json",
        {"max_position_embeddings": 1000},
        "1000 tokens",
    ),
    "a megabyte": ("unet/config.json", {"_note": "a" * loading.MAX_CONFIG}, "1048576 bytes"),
    "10^4 blocks": ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 10**4}, "too long"),
    "deep lists": ("unet/config.json", {"block_out_channels": [[[10**9]]]}, "block_out"),
    "negative": ("unet/config.json", {"in_channels": -5}, "in_channels"),
    "more than the weights": ("unet/config.json", {"block_out_channels": [32, 128]}, "has shape"),
    "words for numbers": ("unet/config.json", {"block_out_channels": ["a", "b"]}, "describe"),
    "unknown block": ("unet/config.json", {"down_block_types": ["Evil", "Block"]}, "describe"),
    "unknown activation": ("text_encoder/config.json", {"hidden_act": "exec"}, "describe"),
    "sdxl": ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid|describe"),
    "odd class": ("text_encoder/config.json", {"architectures": 7}, "names no model class"),
    "odd scale": ("vae/config.json", {"scaling_factor": "much"}, "scaling_factor"),
    "no scale": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    "odd shift": ("vae/config.json", {"shift_factor": [1]}, "shift_factor"),
    "odd size": ("unet/config.json", {"sample_size": "large"}, "sample_size"),
    "flow": ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    "betas beyond floats": (SCHEDULER, {"beta_end": 10**400}, "betas"),
    "trained betas beyond floats": (SCHEDULER, {"trained_betas": [10**400] * 9}, "betas"),
    "scale beyond floats": ("vae/config.json", {"scaling_factor": 10**400}, "scaling_factor"),
    "infinite scale": ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor"),
    "scheduler of flow matching": (SCHEDULER, {"_class_name": FLOW}, FLOW),
    "scheduler of EDM": (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    "no betas": ("scheduler/scheduler_config.json", {"beta_end": 7}, "betas"),
    "not an object": ("unet/config.json", {}, "not a JSON object"),
    "not json": ("vae/config.json", {}, "not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_invalid_configs_are_refused(case: str, sd: Path) -> None:
    path, values, why = CONFIGS[case]
    if case == "not an object":
        (sd / path).write_text("[]")
    elif case == "not json":
        (sd / path).write_text('{"a": ')
    else:
        edit(sd / path, **values)
    expected = "E_BACKBONE_WEIGHTS" if why == "has shape" else "E_BACKBONE_CONFIG"
    with raises_code(expected, match=why):
        open_backbone(str(sd))


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": 10**9},
        {"sample_size": 10**9},
        {"sample_size": 1e9},
        {"sample_size": float("nan")},
        {"norm_type": "x"},
        {"num_embeds_ada_norm": None},
    ],
)
def test_invalid_dit_configs_are_refused(
    values: dict[str, Any], originals: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(originals["dit"], tmp_path / "copy"))
    edit(copy / "transformer/config.json", **values)
    with raises_code("E_BACKBONE_CONFIG"):
        open_backbone(str(copy))


def test_configs_with_large_products_are_refused_before_building(
    originals: dict[str, Path], sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone is within its limit."""
    dit = Path(shutil.copytree(originals["dit"], tmp_path / "wide"))
    edit(
        dit / "transformer/config.json",
        sample_size=1024,
        patch_size=1,
        num_attention_heads=64,
        attention_head_dim=64,
    )
    edit(
        sd / "unet/config.json",
        block_out_channels=[32] * 64,
        down_block_types=["CrossAttnDownBlock2D"] * 64,
        up_block_types=["CrossAttnUpBlock2D"] * 64,
        layers_per_block=32,
        transformer_layers_per_block=64,
    )

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("d3pack.backbones.loading._construct", never)
    with raises_code("E_BACKBONE_CONFIG", match="values of its positions"):
        open_backbone(str(dit))
    with raises_code("E_BACKBONE_CONFIG", match="131072 layers"):
        open_backbone(str(sd))


def test_language_models_may_have_many_positions() -> None:
    """Theirs are computed, for the tokens of a text alone."""
    cls = import_module(loading.CLASSES["Qwen3Model"]).Qwen3Model
    loading._check_products("config.json", cls, {"max_position_embeddings": 40960})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UNet2DConditionModel", SD),
        ("UNet2DConditionModel", SD | {"attention_head_dim": [5, 10, 20, 20]}),  # SD 2.1
        ("UNet2DConditionModel", SDXL),
        ("AutoencoderKL", VAE),
        ("CLIPTextModel", {"max_position_embeddings": 77}),
        ("CLIPTextModelWithProjection", {"max_position_embeddings": 77}),
        ("AutoencoderTiny", {}),
        ("DiTTransformer2DModel", DIT | {"sample_size": 64}),  # for 512 px
    ],
)
def test_published_configs_are_far_below_the_limits(
    name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, times in (("_MAX_LAYERS", 8), ("_MAX_POSITIONS", 8), ("_MAX_TOKENS", 6)):
        value = getattr(loading, limit)
        monkeypatch.setattr(loading, limit, value // times)
    cls = getattr(import_module(loading.CLASSES[name]), name)
    loading.check_config("config.json", config)
    loading._check_products("config.json", cls, config)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tokenizer/vocab.json", "{}"),
        ("tokenizer/vocab.json", '{"a": "b"}'),
        ("tokenizer/merges.txt", "one two three\n"),
        ("tokenizer/merges.txt", "zzz qqq\n"),
        ("tokenizer/tokenizer_config.json", '{"pad_token": "[nothing]"}'),
    ],
)
def test_invalid_tokenizers_are_refused(path: str, text: str, sd: Path) -> None:
    (sd / path).write_text(text)
    with raises_code("E_BACKBONE_CONFIG"):
        open_backbone(str(sd))


def test_tokenizer_with_huge_ids_is_refused(sd: Path) -> None:
    vocab = json.loads((sd / "tokenizer/vocab.json").read_text())
    (sd / "tokenizer/vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": 10**6}))
    with raises_code("E_BACKBONE_CONFIG"):
        open_backbone(str(sd))
