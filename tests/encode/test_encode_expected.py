"""Targets averaged over all images that may lie under a noised one: same mean, less variance."""

from __future__ import annotations

import pytest
import torch

from d3pack.backbones.levels import PREDICTIONS, Levels
from d3pack.encode.methods.d3m.expected import expected_target

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (4, 4, 4)


def levels_of(prediction: str) -> Levels:
    return Levels.from_config({**SCHEDULE, "prediction_type": prediction})


def draw(count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=rng)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_the_mean_over_every_image_by_its_likelihood(prediction: str) -> None:
    levels, rng = levels_of(prediction), torch.Generator().manual_seed(0)
    latents = draw(7, rng)
    x0, eps = latents[[2, 5, 5]], draw(3, rng)
    t = torch.tensor([999, 900, 300])
    x_t, found = expected_target(levels, x0, eps, t, latents)
    assert torch.equal(x_t, levels.noised(x0, eps, t))
    for i in range(3):
        alpha = float(levels.alphas_cumprod[t[i]])
        noises = (x_t[i].double() - alpha**0.5 * latents.double()) / (1 - alpha) ** 0.5
        normal = torch.distributions.Normal(0.0, 1.0)
        logs = normal.log_prob(noises).sum((1, 2, 3))
        shares = (logs - logs.logsumexp(0)).exp()
        one = levels.target(latents, noises.float(), t[i].expand(7))
        wanted = (shares[:, None, None, None] * one).sum(0)
        assert torch.allclose(found[i], wanted.float(), atol=2e-4)
    # far apart and little noise: no other image could have been there
    sure = levels.target(x0, eps, t)[2]
    assert torch.allclose(found[2], sure, atol=1e-3)
    assert not torch.allclose(found[0], levels.target(x0, eps, t)[0], atol=1e-2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_image_is_its_own_mean(prediction: str) -> None:
    levels, rng = levels_of(prediction), torch.Generator().manual_seed(1)
    latents, eps, t = draw(1, rng), draw(4, rng), torch.tensor([0, 10, 500, 999])
    x0 = latents.expand(4, *SHAPE)
    _, found = expected_target(levels, x0, eps, t, latents)
    assert torch.allclose(found, levels.target(x0, eps, t), atol=1e-4)


def test_the_mean_stays_and_the_variance_falls() -> None:
    """Of a product with any function of what the model sees, as a gradient is one."""
    levels, rng = levels_of("v_prediction"), torch.Generator().manual_seed(2)
    latents, count = draw(8, rng), 40_000
    x0, eps = latents[torch.arange(count) % 8], draw(count, rng)
    t = torch.full((count,), 850)
    x_t, averaged = expected_target(levels, x0, eps, t, latents)
    single = levels.target(x0, eps, t)
    probe = torch.tanh(x_t)
    plain = (single * probe).sum((1, 2, 3))
    quiet = (averaged * probe).sum((1, 2, 3))
    error = (plain - quiet).std() / count**0.5
    assert abs(float(plain.mean() - quiet.mean())) < 4 * float(error)
    assert (single - averaged).square().mean() > 0.05 * single.var()
    assert averaged.var() < single.var()
