"""The tables of backbones in the guide and in the README, counted anew from shapes and codecs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from full_backbones import (
    DIT,
    KLEIN,
    PRX,
    SPRINT_SMALL,
    TEXT,
    TEXT_2,
    UNET,
    UNET_XL,
    VAE,
    VAE_DC,
    VAE_FLUX,
    VAE_FLUX_2,
    VAE_XL,
    Z_IMAGE,
    model_of,
)
from places import ROOT
from torch.utils.flop_counter import FlopCounterMode

from d3pack.backbones import Sampling, default_sampling, flux2, lock_directory, prx, sana, z_image
from d3pack.backbones.lock import LIST
from d3pack.backbones.resolve import mini_directory
from d3pack.backbones.sdxl import LAYOUT, _sampling
from d3pack.format.codecs import encode_prompts

GUIDE = (ROOT / "docs" / "guides" / "backbone.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
_OPENERS = {
    "prx": prx.PRX,
    "z-image": z_image.ZImage,
    "flux2": flux2.Flux2,
    "sana-sprint": sana.SanaSprint,
}
FLOW = {kind: opener.args[0] for kind, opener in _OPENERS.items()}
MINI = mini_directory()
TRAILING = {"timestep_spacing": "trailing"}
TURBO = _sampling({"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING})
LIGHTNING = _sampling({"_class_name": "EulerDiscreteScheduler", **TRAILING})
NONE = "–"


def mini(folder: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MINI / folder / "config.json").read_text())
    return config


@dataclass(frozen=True)
class Row:
    kind: str
    pixels: int
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...] = ()
    token: int = 0  # values; 0: takes none
    output: int = 0  # values of an output
    pooled: bool = False
    sampling: Sampling | None = None
    repo: str = ""


ROWS = {
    "`mini`": Row(
        "stable-diffusion", 64, mini("unet"), mini("vae"), (mini("text_encoder"),), 192, 192,
        repo="mini",
    ),
    "Stable Diffusion 1.5": Row("stable-diffusion", 512, UNET, VAE, (TEXT,), 768, 768),
    "SDXL base": Row("sdxl", 1024, UNET_XL, VAE_XL, (TEXT, TEXT_2), 2048, 2048, True),
    "SDXL Turbo": Row("sdxl", 512, UNET_XL, VAE_XL, (TEXT, TEXT_2), 2048, 2048, True, TURBO),
    "SDXL Lightning": Row(
        "sdxl", 1024, UNET_XL, VAE_XL, (TEXT, TEXT_2), 2048, 2048, True, LIGHTNING
    ),
    "DiT-XL/2 256": Row("dit", 256, DIT, VAE, (), 1152),
    "PRX 256": Row("prx", 256, PRX, VAE_FLUX, output=2304),
    "Z-Image-Turbo": Row("z-image", 1024, Z_IMAGE, VAE_FLUX, output=2560),
    "FLUX.2 klein 4B": Row("flux2", 1024, KLEIN, VAE_FLUX_2, output=7680),
    "Sana-Sprint 0.6B": Row("sana-sprint", 1024, SPRINT_SMALL, VAE_DC, output=2304),
}  # fmt: skip


@cache
def count_decoder(text: str, pixels: int) -> tuple[int, float, int]:
    """Parameters, TFLOP for one image, and pixels a side of a latent."""
    with torch.device("meta"):
        model = model_of(json.loads(text))
        config = model.config
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        factor = 2 ** (len(blocks) - 1)
        latent = torch.zeros(1, config.latent_channels, pixels // factor, pixels // factor)
        patch = config.patch_size[0] if hasattr(model, "bn") else 1
        return parameters(model), teraflops(lambda: model.decode(latent)), factor * patch


@cache
def count_denoiser(text: str, kind: str, side: int, tokens: int) -> tuple[int, float]:
    """Parameters, and TFLOP of a forward pass for one image."""
    with torch.device("meta"):
        model = model_of(json.loads(text))
        x = torch.zeros(1, model.config.in_channels, side, side)
        return parameters(model), teraflops(lambda: forward(kind, model, x, tokens))


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def teraflops(call: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e12


def forward(kind: str, model: Any, x: torch.Tensor, tokens: int) -> None:
    t = torch.ones(1)
    if kind in FLOW:
        family = FLOW[kind]
        family.velocity(model, x, t, torch.zeros(1, tokens, model.config[family.width]))
    elif kind == "dit":
        model(x, timestep=t.long(), class_labels=t.long())
    else:
        states = torch.zeros(1, tokens, model.config.cross_attention_dim)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        model(x, t, encoder_hidden_states=states, added_cond_kwargs=added)


def sampling_of(row: Row) -> Sampling:
    own = FLOW[row.kind].sampling if row.kind in FLOW else row.sampling
    return default_sampling(SimpleNamespace(sampling=own, ref=row))


def to_decode(row: Row, both: int) -> str:
    """Bytes to fetch with the text encoder and without it: two for each parameter."""
    if row.repo:
        files = lock_directory(MINI).files
        kept = LAYOUT.without_text(files)
        sizes = [sum(files[path].size for path in paths) for paths in (files, kept)]
    else:
        with torch.device("meta"):
            texts = sum(parameters(model_of(config)) for config in row.texts)
        sizes = [2 * (both + texts), 2 * both]
    shown = [f"{n / 1e9:.1f} GB" if n > 1e9 else f"{n / 1e6:.1f} MB" for n in sizes]
    return f"{shown[0] if row.token else NONE}, {shown[1] if row.output else NONE}"


def stored(vectors: int, width: int) -> str:
    """Bytes a class in f16 and i4."""
    if not width:
        return NONE
    values = np.random.default_rng(0).standard_normal((1, 1, vectors, width), np.float32)
    sizes = [sum(array.nbytes for array in encode_prompts(values, c).tensors.values())
             for c in ("f16", "i4")]  # fmt: skip
    return ", ".join(f"{size:,}" for size in sizes)


def figure(tera: float) -> str:
    return f"{float(f'{tera:.2g}'):g}"


def known(row: Row) -> dict[str, str]:
    """What code says about a row, by column."""
    sampling = sampling_of(row)
    guidance = "" if sampling.guidance == 1 else f", guidance {sampling.guidance:g}"
    return {
        "pixels": str(row.pixels),
        "steps": f"{sampling.steps}{guidance}",
        "a token in f16, i4": stored(1, row.token),
        "an output in f16, i4": stored(1 + row.pooled, row.output),
    }


def counted(row: Row) -> dict[str, str]:
    """What is counted on the meta device."""
    decoder, last, unit = count_decoder(json.dumps(row.vae), row.pixels)
    tokens = row.texts[0]["max_position_embeddings"] if row.texts else 8
    shape = (row.kind, row.pixels // unit, tokens)
    denoiser, once = count_denoiser(json.dumps(row.denoiser), *shape)
    image = sampling_of(row).forwards * once + last
    return {
        "parameters": f"{denoiser / 1e6:,.0f} M",
        "to decode tokens, outputs": to_decode(row, denoiser + decoder),
        "TFLOP a pass, an image": f"{figure(once)}, {figure(image)}",
    }


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """A table by its rows' first cells and its columns."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in rows}


@pytest.mark.parametrize("name", ROWS)
def test_guide_has_the_sampling_and_the_bytes_of_each_row(name: str) -> None:
    row = table(GUIDE, "backbone")[name]
    assert row == {**row, **known(ROWS[name])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_guide_has_the_parameters_and_flops_of_each_row(name: str) -> None:
    row = table(GUIDE, "backbone")[name]
    assert row == {**row, **counted(ROWS[name])}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ROWS)
def test_widths_are_those_of_the_models(name: str) -> None:
    row = ROWS[name]
    token = sum(config["hidden_size"] for config in row.texts)
    output = row.denoiser.get("cross_attention_dim", 0)
    if row.kind in FLOW:
        with torch.device("meta"):
            output = model_of(row.denoiser).config[FLOW[row.kind].width]
    elif row.kind == "dit":
        token = row.denoiser["num_attention_heads"] * row.denoiser["attention_head_dim"]
    assert (row.token, row.output) == (token, output)
    assert row.pooled == (row.denoiser.get("addition_embed_type") == "text_time")


def test_guide_has_no_other_rows_and_the_licence_of_mini() -> None:
    rows = table(GUIDE, "backbone")
    assert list(rows) == list(ROWS)
    assert rows["`mini`"]["licence"] == json.loads((MINI / LIST).read_text())["licence"]


def test_readme_repeats_rows_of_the_guide() -> None:
    rows, short = table(GUIDE, "backbone"), table(README, "backbone")
    assert len(short) == 8
    for name, row in short.items():
        full = rows[name]
        fourth = [full[f"{what} in f16, i4"].split(", ")[-1] for what in ("a token", "an output")]
        tera = full["TFLOP a pass, an image"].split(", ")[0]
        assert row == {
            "backbone": name,
            "licence": full["licence"],
            "pixels; steps": f"{full['pixels']}; {full['steps']}",
            "parameters; TFLOP a pass": f"{full['parameters']}; {tera}",
            "to decode tokens, outputs": full["to decode tokens, outputs"],
            "bytes a class: a token, an output": "; ".join(fourth),
        }
