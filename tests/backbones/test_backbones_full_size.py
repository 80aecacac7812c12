"""Backbones of full size with random half-size weights: minutes, 10 GB of memory, 8 GB of disk.

The shapes are those of the published configs; they go through the code that opens everything else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from full_backbones import full_denoiser, full_dit, full_sd, model_of

from d3pack.backbones import lock_directory, open_backbone
from d3pack.decode import samplers

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for gigabytes, which pytest would keep for three runs."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    yield tmp_path / "full"
    shutil.rmtree(tmp_path / "full", ignore_errors=True)


@pytest.mark.parametrize(
    ("make", "latent", "prompt"),
    [(full_sd, (4, 64, 64), (75, 768)), (full_dit, (4, 32, 32), (1, 1152))],
)
def test_full_size_models_have_their_shapes(
    make: Callable[[Path], Path],
    latent: tuple[int, ...],
    prompt: tuple[int, int],
    place: Path,
) -> None:
    ref = lock_directory(make(place))
    backbone = open_backbone(ref, path=place, dtype=torch.bfloat16)
    assert (backbone.latent_shape, backbone.prompt_shape) == (latent, prompt)
    with torch.no_grad():
        vectors = torch.randn(1, 1, prompt[1]) * 0.02
        c = backbone.condition(vectors)
        sigma = samplers.schedule(backbone.levels.alphas_cumprod, "ddim", 1)[0]
        x0 = backbone.denoise(samplers.start(torch.randn(1, *latent), (sigma,)), sigma, c)
        assert x0.shape == (1, *latent)
        assert torch.isfinite(x0).all()
        images = backbone.decode(x0)
    assert images.shape == (1, 3, 8 * latent[1], 8 * latent[2])
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("kind", "latent", "outputs"),
    [
        ("prx", (16, 32, 32), (1, 256, 2304)),
        ("sana-sprint", (32, 32, 32), (1, 300, 2304)),
        ("sdxl", (4, 128, 128), (2, 78, 2048)),
        ("flux2", (128, 64, 64), (1, 512, 7680)),
    ],
)
@torch.no_grad()
def test_full_size_denoisers_give_equal_bits_without_the_encoder(
    kind: str, latent: tuple[int, ...], outputs: tuple[int, int, int], place: Path
) -> None:
    """At 64 pixels: processors without bfloat16 take minutes for the size of the model."""
    ref = lock_directory(full_denoiser(kind, place))
    for folder in [*place.glob("text_encoder*"), *place.glob("tokenizer*")]:
        shutil.rmtree(folder)
    backbone = open_backbone(ref, path=place, dtype=torch.bfloat16, encoder=False)
    assert (backbone.latent_shape, backbone.output_shape) == (latent, outputs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *backbone.latent_shape_for((64, 64)), generator=generator)
    vectors = torch.randn(2, outputs[0], outputs[2], generator=generator)
    if kind == "sdxl":
        vectors[:, -1, 1280:] = 0  # of the pooled vector
    first, again, other = (
        backbone.denoise(x, 1.0, backbone.condition(vectors[row : row + 1], None))
        for row in (0, 0, 1)
    )
    assert (first.shape, first.dtype) == (x.shape, torch.float32)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    pixels = backbone.decode_float(first)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 64, 64), torch.float32)
    assert torch.isfinite(pixels).all()
    assert torch.equal(pixels, backbone.decode_float(again))


def test_sdxl_has_its_published_parameters() -> None:
    """With its text encoders, on the meta device."""
    from full_backbones import TEXT, TEXT_2, UNET_XL, VAE

    from d3pack.backbones.loading import check_config
    from d3pack.backbones.sdxl import _pooled_width

    for config in (UNET_XL, TEXT_2, VAE):
        check_config("config.json", config)
    assert _pooled_width(UNET_XL) == 1280 == TEXT_2["projection_dim"]
    assert TEXT["hidden_size"] + TEXT_2["hidden_size"] == UNET_XL["cross_attention_dim"] == 2048
    with torch.device("meta"):
        models = [model_of(config) for config in (UNET_XL, VAE, TEXT, TEXT_2)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    x, states = torch.empty(1, 4, 128, 128, device="meta"), torch.empty(1, 3, 2048, device="meta")
    added = {
        "text_embeds": torch.empty(1, 1280, device="meta"),
        "time_ids": torch.empty(1, 6, device="meta"),
    }
    t = torch.empty(1, device="meta")
    out = models[0](x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
    assert out.shape == x.shape
