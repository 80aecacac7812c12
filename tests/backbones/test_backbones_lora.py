"""LoRA files under every name that people use become the same adapter, which is exact to remove."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import tiny_dit, tiny_sd
from tiny_flow import tiny_flow

from d3pack.backbones import apply_adapter, open_backbone, read_lora
from d3pack.errors import NotFoundError, UsageError

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
RANK, ALPHA = 2, 3.0


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_backbone(str(tiny_sd(tmp_path_factory.mktemp("lora") / "sd")))


def factors(backbone: Any, layers: tuple[str, ...] = LAYERS) -> dict[str, tuple[Any, Any]]:
    """Both factors of each layer, as convolutions where the layer is one."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in layers:
        shape = tuple(backbone.named_tensors()[f"{layer}.weight"].shape)
        ones = (1,) * (len(shape) - 2)
        a = torch.randn(RANK, *shape[1:], generator=generator)
        made[layer] = (a, torch.randn(shape[0], RANK, *ones, generator=generator))
    return made


Parts = dict[str, tuple[Any, Any]]


def peft(parts: Parts, prefix: str = "unet.") -> dict[str, Any]:
    named = {f"{prefix}{n}.lora_A.weight": a for n, (a, _) in parts.items()}
    return {**named, **{f"{prefix}{n}.lora_B.weight": b for n, (_, b) in parts.items()}}


def with_alpha(named: dict[str, Any]) -> dict[str, Any]:
    layers = {n.rpartition(".lora_")[0] for n in named}
    return {**named, **{f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}}


def older(parts: Parts) -> dict[str, Any]:
    """Names of diffusers before peft; these files scale the factors themselves."""
    named = {f"unet.{n}.lora.down.weight": a for n, (a, _) in parts.items()}
    scaled = {n: b * ALPHA / RANK for n, (_, b) in parts.items()}
    return {**named, **{f"unet.{n}.lora.up.weight": b for n, b in scaled.items()}}


def kohya(parts: Parts) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for layer, (a, b) in parts.items():
        flat = "lora_unet_" + layer.replace(".", "_")
        named |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        named[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return named


FORMS: dict[str, Callable[[Parts], dict[str, Any]]] = {
    "peft": lambda parts: with_alpha(peft(parts)),
    "peft alone": lambda parts: with_alpha(peft(parts, "base_model.model.")),
    "older": older,
    "kohya": kohya,
}


def saved(path: Path, named: dict[str, Any], **metadata: Any) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_change_of_weights(form: str, backbone: Any, tmp_path: Path) -> None:
    parts = factors(backbone)
    adapter = read_lora(saved(tmp_path / "a.safetensors", FORMS[form](parts)), backbone)
    named = backbone.named_tensors()
    before = {name: tensor.clone() for name, tensor in named.items()}
    with apply_adapter(backbone, adapter):
        for layer, (a, b) in parts.items():
            name = f"{layer}.weight"
            change = (ALPHA / RANK) * (b.flatten(1) @ a.flatten(1)).reshape(before[name].shape)
            torch.testing.assert_close(named[name], before[name] + change, rtol=1e-4, atol=1e-4)
        tuned = {f"{layer}.weight" for layer in parts}
        assert all(torch.equal(named[n], before[n]) for n in named if n not in tuned)
    assert all(torch.equal(named[name], before[name]) for name in named)


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_the_metadata_counts(rslora: bool, backbone: Any, tmp_path: Path) -> None:
    parts = factors(backbone, LAYERS[:2])
    settings = {
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {LAYERS[1]: 5},
        "unet.use_rslora": rslora,
    }
    path = tmp_path / "a.safetensors"
    saved(path, peft(parts), lora_adapter_metadata=json.dumps(settings))
    adapter = read_lora(path, backbone)
    rank = math.sqrt(RANK) if rslora else RANK
    for layer, alpha in zip(LAYERS, (8, 5), strict=False):
        wanted = parts[layer][1] * (alpha / rank)
        torch.testing.assert_close(adapter[f"{layer}.weight.lora_b"], wanted)
    plain = read_lora(saved(path, peft(parts)), backbone)  # without a weight it is 1
    assert torch.equal(plain[f"{LAYERS[0]}.weight.lora_b"], parts[LAYERS[0]][1])


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("prx", "blocks.0.attention.img_qkv_proj"),
        ("z-image", "layers.1.attention.to_out.0"),
        ("flux2", "transformer_blocks.0.attn.to_q"),
        ("sana-sprint", "transformer_blocks.1.attn2.to_k"),
    ],
)
def test_transformers_are_tuned(kind: str, layer: str, tmp_path: Path) -> None:
    backbone = open_backbone(str(tiny_flow(kind, tmp_path / kind)))
    parts = factors(backbone, (layer,))
    adapter = read_lora(saved(tmp_path / "a.safetensors", peft(parts, "transformer.")), backbone)
    assert set(adapter) == {f"{layer}.weight.lora_a", f"{layer}.weight.lora_b"}


def test_what_is_no_lora_of_this_backbone_is_refused(backbone: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = peft(factors(backbone, LAYERS[:1]))
    a, b = f"unet.{LAYERS[0]}.lora_A.weight", f"unet.{LAYERS[0]}.lora_B.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "holds no tensors"),
        ({a: good[a]}, "lacks one of its two factors"),
        ({**good, a: torch.randn(2, 7)}, "made for another backbone: .*lora_a of shape"),
        ({**good, b: good[b][:, :1]}, "made for another backbone: the low-rank factors"),
        ({"unet.other.lora_A.weight": good[a]}, "another backbone: this one has no layer"),
        ({"text_encoder.x.lora_A.weight": good[a]}, "tunes a text encoder"),
        ({"lora_te1_x.lora_down.weight": good[a]}, "tunes a text encoder"),
        (
            {**good, f"unet.{LAYERS[0]}.lora_magnitude_vector": good[a][0].clone()},
            "not part of a plain",
        ),
        ({"unet.x.hada_w1_a": good[a]}, "not part of a plain LoRA"),
        ({**good, a: good[a] * math.nan}, "not finite"),
        ({**good, a: good[a].int()}, "not finite"),
    ]
    for named, why in cases:
        with pytest.raises(UsageError, match=why) as caught:
            read_lora(saved(path, named), backbone)
        assert "\n" not in str(caught.value)
    dit: Any = open_backbone(str(tiny_dit(tmp_path / "dit")))
    with pytest.raises(UsageError, match="another backbone"):
        read_lora(saved(path, good), dit)
    torch.save(good, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="not a safetensors file"):
        read_lora(tmp_path / "a.pt", backbone)
    with pytest.raises(NotFoundError, match="there is no file"):
        read_lora(tmp_path / "nowhere.safetensors", backbone)


DAMAGED: dict[str, tuple[Callable[[str, Any, Any], dict[str, Any]], str]] = {
    "alphas": (lambda n, a, b: {n + "alpha": torch.ones(2)}, "alpha of .* has 2 values"),
    "0-d": (lambda n, a, b: {n + "lora_A.weight": torch.tensor(1.0)}, "not matrices"),
    "1-d": (lambda n, a, b: {n + "lora_B.weight": b[:, 0]}, "not matrices"),
    "rank 0": (
        lambda n, a, b: {n + "lora_A.weight": a[:0], n + "lora_B.weight": b[:, :0]},
        "not matrices of rank 1",
    ),
    "two parts": (lambda n, a, b: {n + "lora_down.weight": a}, "a tensor of .* twice"),
    "two names": (
        lambda n, a, b: {
            f"lora_{n.replace('.', '_')[:-1]}.lora_down.weight": a,
            f"lora_{n.replace('.', '_')[:-1]}.lora_up.weight": b,
        },
        "twice, under two names",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_factors_are_refused_in_one_line(case: str, backbone: Any, tmp_path: Path) -> None:
    change, why = DAMAGED[case]
    parts = factors(backbone, LAYERS[:1])
    named = {**peft(parts), **change(f"unet.{LAYERS[0]}.", *parts[LAYERS[0]])}
    path = saved(tmp_path / "a.safetensors", {n: t.clone() for n, t in named.items()})
    with pytest.raises(UsageError, match=why) as caught:
        read_lora(path, backbone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ('{"unet.alpha_pattern": ["x"]}', "alpha_pattern is a list"),
        ('{"unet.alpha_pattern": {".*to_q": 2}}', "not a layer's name"),
        ('{"unet.lora_alpha": NaN}', "nan, not a finite number"),
        ('{"unet.lora_alpha": 1e999}', "inf, not a finite number"),
        ('{"unet.lora_alpha": 1e300}', "too large"),
        ('{"unet.lora_alpha": 1%s}' % ("0" * 400), "int, not a finite number"),
        ('{"unet.lora_alpha": true}', "bool, not a finite number"),
        ('{"unet.lora_alpha": 1%s}' % ("0" * 5000), "not a JSON object"),
        ("[1]", "not a JSON object"),
    ],
    ids=range(9),
)
def test_wrong_settings_are_refused_in_one_line(
    metadata: str, why: str, backbone: Any, tmp_path: Path
) -> None:
    named = peft(factors(backbone, LAYERS[:1]))
    path = saved(tmp_path / "a.safetensors", named, lora_adapter_metadata=metadata)
    with pytest.raises(UsageError, match=why) as caught:
        read_lora(path, backbone)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_keeps_alpha_beside_its_file(rslora: bool, backbone: Any, tmp_path: Path) -> None:
    parts = factors(backbone, LAYERS[:2])
    path = saved(tmp_path / "adapter_model.safetensors", peft(parts, "base_model.model."))
    with pytest.raises(UsageError, match=r"without its adapter_config\.json"):
        read_lora(path, backbone)
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8}
    config |= {"alpha_pattern": {"attn2.to_out.0": 5, "to_out": 9}, "use_rslora": rslora}
    told = tmp_path / "adapter_config.json"
    told.write_text(json.dumps(config))
    adapter = read_lora(path, backbone)
    for layer, alpha in zip(LAYERS, (8, 5), strict=False):
        wanted = parts[layer][1] * (alpha / (math.sqrt(RANK) if rslora else RANK))
        torch.testing.assert_close(adapter[f"{layer}.weight.lora_b"], wanted)
    for wrong, why in (
        ({"use_dora": True}, "use_dora"),
        ({"r": 7}, "has rank 2, its settings say 7"),
        ({"peft_type": "LOHA"}, "not of a LoRA"),
        ({"lora_alpha": None}, "NoneType, not a finite number"),
    ):
        told.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(UsageError, match=why):
            read_lora(path, backbone)


def test_original_names_of_sdxl_are_those_of_diffusers() -> None:
    from d3pack.backbones.lora import _plain

    for original, ours in (
        ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks_8_1_proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("output_blocks_5_1_proj_in", "up_blocks.1.attentions.2.proj_in"),
    ):
        assert _plain(original) == _plain(ours)
