"""Each sampler against its diffusers scheduler: same model, same noise, 1e-4."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from d3pack.backbones.levels import PREDICTIONS, PURE, VELOCITY, Levels
from d3pack.decode import samplers
from d3pack.errors import UsageError
from d3pack.testing import raises_code

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
PLAIN = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
BETAS: dict[str, Any] = {"scaled_linear": SD, "cosine": COSINE, "linear": PLAIN}
# a cosine table ends at sigma 2e4: x - sigma * eps has no digits left in float32, here as there
WELL_POSED = [(b, p) for b in BETAS for p in PREDICTIONS if (b, p) != ("cosine", "epsilon")]


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """Smooth in x and t, bounded, and nothing a solver could be exact for by luck."""
    wave = torch.linspace(0.5, 2.0, x[0].numel()).reshape(x[0].shape)
    return torch.tanh(x * wave + math.sin(t / 90)) + 0.3 * torch.cos(x * 2 + t / 300)


def ours(
    sampler: str, config: dict[str, Any], steps: int, first: torch.Tensor, spacing: str, **more: Any
) -> torch.Tensor:
    levels = Levels.from_config(config)
    sigmas = samplers.schedule(levels.alphas_cumprod, sampler, steps, spacing)

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        t = levels.timestep(sigma)
        assert t == int(t)  # a sigma that `schedule` made is a table entry
        return levels.denoised(x, sigma, network(x / math.sqrt(sigma**2 + 1), t))

    return samplers.sample(sampler, model, samplers.start(first, sigmas), sigmas, **more)


def theirs(scheduler: Any, steps: int, start: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, float(t)), t, x).prev_sample
    return x


@pytest.mark.parametrize(("betas", "prediction"), WELL_POSED)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_matches_diffusers(prediction: str, betas: str, spacing: str) -> None:
    config = {**BETAS[betas], "prediction_type": prediction}
    steps = 10
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler(**config, clip_sample=False, timestep_spacing=spacing)
    torch.testing.assert_close(
        ours("ddim", config, steps, noise, spacing),
        theirs(scheduler, steps, noise),
        rtol=1e-4,
        atol=1e-4,
    )


def test_leading_timesteps_leave_out_the_offset() -> None:
    """Stable Diffusion 1.5's scheduler has `steps_offset` 1; a recipe of ours starts one lower."""
    for offset in (0, 1):
        scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
        scheduler.set_timesteps(20)
        ours = [t + offset for t in samplers.timesteps(1000, "ddim", 20, "leading")]
        assert ours == scheduler.timesteps.tolist()


def test_linspace_timesteps_match_diffusers() -> None:
    scheduler = DDIMScheduler(**SD, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    assert samplers.timesteps(1000, "ddim", 10, "linspace") == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(("betas", "prediction"), WELL_POSED)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 20])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_dpmpp_2m_matches_diffusers(prediction: str, betas: str, steps: int, spacing: str) -> None:
    config = {**BETAS[betas], "prediction_type": prediction}
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    scheduler = DPMSolverMultistepScheduler(
        **config,
        solver_order=2,
        solver_type="midpoint",
        algorithm_type="dpmsolver++",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing=spacing,
    )
    wanted = theirs(scheduler, steps, noise)
    torch.testing.assert_close(
        ours("dpmpp-2m", config, steps, noise, spacing), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_euler_matches_diffusers(prediction: str, betas: str) -> None:
    config = {**BETAS[betas], "prediction_type": prediction}
    steps = 12
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler = EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    start = noise * math.sqrt(float(scheduler.sigmas[0]) ** 2 + 1)
    torch.testing.assert_close(
        ours("euler", config, steps, noise, "trailing"),
        theirs(scheduler, steps, start),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_matches_diffusers(
    prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**SD, "prediction_type": prediction}
    fresh = torch.randn(steps + 1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    given = iter(fresh[1:])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(given)
    )
    wanted = theirs(LCMScheduler(**config, clip_sample=False), steps, fresh[0])
    found = ours("lcm", config, steps, fresh[0], "trailing", noise=lambda i: fresh[i])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_table_sampler_reproduces_the_others() -> None:
    levels = Levels.from_config(SD)
    sigmas = samplers.schedule(levels.alphas_cumprod, "table", 7)
    rows = [[s.a, list(s.b)] for s in samplers.plan("dpmpp-2m", sigmas)]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = ours("table", SD, 7, noise, "trailing", extra={"table": rows})
    assert torch.equal(found, ours("dpmpp-2m", SD, 7, noise, "trailing"))


def test_table_rows_may_reach_back_less_far() -> None:
    rows = [[0.5, [0.5]], [0.5, [0.4, 0.1]], [0.2, [0.5, 0.2, 0.1]]]
    x0 = iter([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])])
    found = samplers.sample(
        "table",
        lambda x, sigma: next(x0),
        torch.tensor([8.0]),
        (3.0, 2.0, 1.0, 0.0),
        extra={"table": rows},
    )
    first = 0.5 * 8 + 0.5 * 1
    second = 0.5 * first + 0.4 * 2 + 0.1 * 1
    assert found.item() == pytest.approx(0.2 * second + 0.5 * 4 + 0.2 * 2 + 0.1 * 1)


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        [[1.0, [0.0]]],
        [[1.0, [0.0]], [1.0, [0.1, 0.2, 0.3]]],
        [[1.0, [0.0]], [1.0, []]],
        [[1.0, [0.0]], [float("nan"), [0.1]]],
        [[1.0, [0.0]], ["a", [0.1]]],
        [[1.0, [0.0]], 7],
    ],
)
def test_invalid_sampler_tables_are_refused(table: Any) -> None:
    with raises_code("E_RECIPE"):
        samplers.plan("table", (2.0, 1.0, 0.0), {"table": table})


@pytest.mark.parametrize(
    "sigmas", [(0.0,), (1.0, 2.0, 0.0), (1.0, 0.5), (math.inf, 1.0, 0.0), (2.0, 2.0, 0.0)]
)
def test_invalid_sigmas_are_refused(sigmas: tuple[float, ...]) -> None:
    with raises_code("E_RECIPE"):
        samplers.plan("ddim", sigmas)


def test_invalid_sampler_calls_are_refused() -> None:
    alphas = Levels.from_config(SD).alphas_cumprod
    with pytest.raises(UsageError, match="invalid steps 1001"):
        samplers.schedule(alphas, "ddim", 1001)
    with pytest.raises(UsageError, match="invalid steps 51"):
        samplers.schedule(alphas, "lcm", 51)
    with pytest.raises(UsageError, match="spacing"):
        samplers.schedule(alphas, "ddim", 10, "random")
    with raises_code("E_RECIPE", match="unknown sampler"):
        samplers.schedule(alphas, "heun", 10)
    with pytest.raises(UsageError, match="fresh noise"):
        samplers.sample("lcm", lambda x, s: x, torch.zeros(1), (2.0, 1.0, 0.0))


@pytest.mark.parametrize("betas", BETAS)
def test_betas_match_diffusers(betas: str) -> None:
    mine = Levels.from_config(BETAS[betas]).alphas_cumprod
    known = DDIMScheduler(**BETAS[betas]).alphas_cumprod.double().numpy()
    assert abs(mine - known).max() < 1e-5


def test_zero_terminal_snr_is_finite_in_float32() -> None:
    config = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    levels = Levels.from_config(config)
    sigmas = samplers.schedule(levels.alphas_cumprod, "ddim", 10)
    assert 4000 < sigmas[0] < 4100
    scheduler = EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    assert levels.alphas_cumprod == pytest.approx(
        scheduler.alphas_cumprod.double().numpy(), abs=1e-5
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    narrow = ours("ddim", config, 10, noise, "trailing")
    wide = ours("ddim", config, 10, noise.double(), "trailing")
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


def test_timesteps_of_other_sigmas_lie_between() -> None:
    levels = Levels.from_config(SD)
    assert levels.timestep(levels.sigmas[500]) == 500
    between = math.sqrt(levels.sigmas[500] * levels.sigmas[501])
    assert 500 < levels.timestep(between) < 501
    assert levels.timestep(1e9) == 999
    assert levels.timestep(1e-9) == 0


def flowed(
    sampler: str, times: list[float], first: torch.Tensor, noise: Any = None, **extra: Any
) -> torch.Tensor:
    """Sample with a velocity model over times of flow matching; time 1 is the sigma `PURE`."""
    levels = Levels.flow()
    sigmas = [PURE if t == 1 else t / (1 - t) for t in times]

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        velocity = network(levels.scaled(x, sigma), 1000 * levels.time(sigma))
        return levels.denoised(x, sigma, velocity)

    return samplers.sample(sampler, model, samplers.start(first, sigmas), sigmas, noise, extra)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_steps_match_diffusers(steps: int, shift: float) -> None:
    """Euler over velocities is the same step as ours, from noise alone on."""
    first = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    wanted = first
    for t in scheduler.timesteps:
        wanted = scheduler.step(network(wanted, float(t)), t, wanted).prev_sample
    times = scheduler.sigmas.double().tolist()
    for sampler in ("euler", "ddim"):
        found = flowed(sampler, times, first)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    sigmas = samplers.schedule(Levels.flow(shift).alphas_cumprod, "euler", steps)
    assert sigmas[0] <= PURE
    assert [s / (1 + s) for s in sigmas] == pytest.approx(times, abs=1e-3 if steps == 28 else 2e-6)


def test_stochastic_flow_steps_match_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers calls stochastic sampling of flows is the sampler lcm."""
    generator = torch.Generator().manual_seed(5)
    first, *fresh = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(6))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    pending = iter(fresh)
    module = "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: next(pending))
    wanted = first
    for t in scheduler.timesteps:
        wanted = scheduler.step(network(wanted, float(t)), t, wanted).prev_sample
    found = flowed("lcm", scheduler.sigmas.tolist(), first, lambda i: fresh[i - 1])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_of_a_flow_keep_the_distribution(eta: float) -> None:
    """Of data of variance 0.25, whose velocity is known, all steps together make such data."""
    levels, variance = Levels.flow(3.0), 0.25
    generator = torch.Generator().manual_seed(6)

    def draw(_: int = 0) -> torch.Tensor:
        return torch.randn(1, 4, 80, 80, generator=generator)

    sigmas = samplers.schedule(levels.alphas_cumprod, "ancestral", 800)

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        x_t, t = levels.scaled(x, sigma), levels.time(sigma)
        total = (1 - t) ** 2 * variance + t**2
        velocity = x_t * (t - (1 - t) * variance) / total  # E[eps - x0 | x_t]
        return levels.denoised(x, sigma, velocity)

    x = samplers.start(draw(), sigmas)
    made = samplers.sample("ancestral", model, x, sigmas, draw, {"eta": eta})
    assert float(made.var()) == pytest.approx(variance, rel=0.05)
    assert abs(float(made.mean())) < 0.02


@pytest.mark.parametrize("prediction", [*PREDICTIONS, VELOCITY])
def test_targets_invert_on_the_training_scale(prediction: str) -> None:
    flow = prediction == VELOCITY
    levels = Levels.flow(3.0) if flow else Levels.from_config({**SD, "prediction_type": prediction})
    x0, eps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([0, 400, 999])
    x_t = levels.noised(x0, eps, t)
    target = levels.target(x0, eps, t)
    torch.testing.assert_close(levels.x0(x_t, t, target), x0, rtol=1e-3, atol=1e-3)
    for row, step in enumerate(t.tolist()):
        sigma = float(levels.sigmas[step])
        x = x0[row] + sigma * eps[row]
        torch.testing.assert_close(levels.scaled(x, sigma), x_t[row], rtol=1e-4, atol=1e-5)
        found = levels.denoised(x, sigma, target[row])
        torch.testing.assert_close(found, x0[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "wavy"},
        {"prediction_type": "flow"},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": "many"},
        {"beta_start": "small"},
        {"beta_start": -0.1},
        {"trained_betas": [0.1, 2.0]},
        {"trained_betas": "all"},
    ],
)
def test_invalid_scheduler_configs_are_refused(config: dict[str, Any]) -> None:
    with raises_code("E_BACKBONE_CONFIG"):
        Levels.from_config(config)
