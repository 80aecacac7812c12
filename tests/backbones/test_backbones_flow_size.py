"""Flow-matching transformers of the published shapes, on the meta device: parameters and FLOPs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_backbones import KLEIN, PRX, SPRINT, SPRINT_SMALL, Z_IMAGE, model_of
from torch.utils.flop_counter import FlopCounterMode

from d3pack.backbones import flux2, prx, sana, z_image

pytestmark = pytest.mark.slow

# module, family, config, latent, parameters in millions, TFLOP of a forward pass of 8 vectors
SIZES: dict[str, tuple[Any, Any, dict[str, Any], tuple[int, ...], int, float]] = {
    "prx 256": (prx, prx.PRX, PRX, (16, 32, 32), 1171, 0.39),
    "z-image 1024": (z_image, z_image.ZImage, Z_IMAGE, (16, 128, 128), 6155, 55.1),
    "flux2 klein 512": (flux2, flux2.Flux2, KLEIN, (128, 32, 32), 3876, 6.66),
    "flux2 klein 1024": (flux2, flux2.Flux2, KLEIN, (128, 64, 64), 3876, 30.4),
    "sana-sprint 0.6B 1024": (sana, sana.SanaSprint, SPRINT_SMALL, (32, 32, 32), 594, 1.04),
    "sana-sprint 1.6B 1024": (sana, sana.SanaSprint, SPRINT, (32, 32, 32), 1610, 2.79),
}


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_full_size_transformers_have_their_parameters_and_flops(name: str) -> None:
    module, opener, config, latent, millions, tera = SIZES[name]
    family = opener.args[0]
    with torch.device("meta"):
        model = model_of(config)
        x, times = torch.zeros(1, *latent), torch.zeros(1)
        vectors = torch.zeros(1, 8, model.config[family.width])
        with FlopCounterMode(display=False) as counter:
            out = family.velocity(model, x, times, vectors)
    assert module.LAYOUT.denoiser == type(model).__name__ == family.transformer
    assert out.shape == x.shape
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert counter.get_total_flops() / 1e12 == pytest.approx(tera, rel=0.01)


def test_full_size_shifts_are_those_of_the_pipeline() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    family = flux2.Flux2.args[0]
    for tokens, steps in itertools.product((256, 1024, 4096, 5000), (4, 50)):
        mu = compute_empirical_mu(tokens, steps)
        shift = family.shift(SimpleNamespace(), tokens, steps)
        assert shift == pytest.approx(torch.tensor(mu).exp())
