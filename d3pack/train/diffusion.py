"""Stage three: the denoiser. What it is conditioned on is the business of a `Conditioner`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn

from d3pack.backbones.levels import Levels
from d3pack.train.config import DiffusionConfig, LoopConfig
from d3pack.train.grid import save_grid
from d3pack.train.latents import Latents
from d3pack.train.loop import Batch
from d3pack.train.photos import batch_rows

# Stable Diffusion's own noise levels, so that its samplers and their defaults hold here too.
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

JUDGED = 1024  # tuples at most
JUDGED_LOG_SIGMA = (0.2, 1.3)  # their levels, the same for every preset: losses stay comparable


class Conditioner(Protocol):
    """Turns labels into what the denoiser takes besides latents and time."""

    def given(
        self, labels: NDArray[np.int64], collage: NDArray[np.bool_], rng: np.random.Generator
    ) -> Batch:
        """Keyword arguments of the denoiser, for training: varied, and dropped at random."""
        ...

    def wanted(self, labels: Sequence[int]) -> tuple[Batch, Batch]:
        """The same for sampling: (conditional, unconditional)."""
        ...


def build_unet(
    config: DiffusionConfig, latent_channels: int, latent_size: int, text_width: int
) -> UNet2DConditionModel:
    down = [("CrossAttnDownBlock2D" if a else "DownBlock2D") for a in config.attention]
    up = [("CrossAttnUpBlock2D" if a else "UpBlock2D") for a in reversed(config.attention)]
    made = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        attention_head_dim=tuple(c // config.head_width for c in config.channels),
        cross_attention_dim=text_width,
        norm_num_groups=16,
        time_embedding_dim=config.time_width,
        resnet_time_scale_shift="scale_shift",
        # a pooled reading of the prompt joins the time embedding: class reaches every layer at once
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return _for_training(made)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Existing weights, to be trained on."""
    return _for_training(UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32))


def _for_training(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """On so few tokens plain matrix products train a third faster than fused attention (CPU)."""
    unet.set_attn_processor(AttnProcessor())
    return unet


class Diet(Protocol):
    """What a task reads of its settings, whatever model they describe."""

    @property
    def loop(self) -> LoopConfig: ...

    @property
    def log_sigma(self) -> tuple[float, float]: ...

    @property
    def guidance(self) -> float: ...


class DenoiserModule(nn.Module):
    """The loss of what `levels` says a model predicts, at one noise level per sample."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(
        self, latents: Tensor, noise: Tensor, times: Tensor, **condition: Tensor
    ) -> dict[str, Tensor]:
        noised = self.levels.noised(latents, noise, times)
        found = self.model(noised, times, **condition, return_dict=False)[0]
        wanted = self.levels.target(latents, noise, times)
        error = (found.float() - wanted).square().mean((1, 2, 3))
        return {"loss": error.mean(), "each": error}


class DiffusionTask:
    name = "diffusion"

    def __init__(
        self,
        config: Diet,
        build: Callable[[], nn.Module],
        latents: Latents,
        judged: Latents,
        conditioner: Conditioner,
        decode: Callable[[Tensor], Tensor],
        preview_labels: Sequence[int],
        seed: int,
        levels: Levels,
    ) -> None:
        self.config, self.build, self.latents, self.judged = config, build, latents, judged
        self.conditioner, self.decode, self.seed = conditioner, decode, seed
        self.preview_labels = preview_labels
        self.levels, self.log_sigmas = levels, np.log(levels.sigmas)

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return DenoiserModule(self.build(), self.levels)

    def _triples(
        self,
        latents: Latents,
        rows: NDArray[np.int64],
        rng: np.random.Generator,
        log_sigma: tuple[float, float],
    ) -> Batch:
        mean, deviation = log_sigma
        clean = torch.from_numpy(latents.values[rows]).float()
        levels = mean + deviation * rng.standard_normal(len(rows))
        times = np.searchsorted(self.log_sigmas, levels).clip(0, len(self.log_sigmas) - 1)
        return {
            "latents": clean,
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "times": torch.from_numpy(times),
            **self.conditioner.given(latents.labels[rows], latents.collage[rows], rng),
        }

    def batch(self, step: int, rank: int, world: int, progress: float) -> Batch:
        at = step * world + rank
        rows = batch_rows(len(self.latents.labels), self.config.loop.batch, at, self.seed)
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 4, at]))
        return self._triples(self.latents, rows, rng, self.config.log_sigma)

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """The loss on fixed (held-back image, noise, level, caption) tuples."""
        device = next(module.parameters()).device
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 5, 0]))
        rows = np.linspace(
            0, len(self.judged.labels) - 1, min(JUDGED, len(self.judged.labels))
        ).astype(np.int64)
        triples = self._triples(self.judged, rows, rng, JUDGED_LOG_SIGMA)
        total = 0.0
        for start in range(0, len(rows), 128):
            part = {k: v[start : start + 128].to(device) for k, v in triples.items()}
            with torch.autocast(device.type, torch.bfloat16):
                total += float(module(**part)["each"].sum())
        return {"held_loss": total / len(rows)}

    @torch.no_grad()
    def preview(self, module: nn.Module, path: Path) -> None:
        assert isinstance(module, DenoiserModule)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.preview_labels), *self.latents.values.shape[1:])
        noise = torch.randn(shape, generator=generator)
        found = sample(
            module.model,
            noise,
            *self.conditioner.wanted(self.preview_labels),
            guidance=self.config.guidance,
        )
        save_grid(self.decode(found), path, columns=16)


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    conditional: Batch,
    unconditional: Batch,
    *,
    guidance: float,
    steps: int = 12,
) -> Tensor:
    """Latents from noise, for the eye; packs and benchmarks use the project's own samplers."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE_OF_SAMPLES)
    scheduler.set_timesteps(steps)
    device = next(model.parameters()).device
    both = {k: torch.cat([unconditional[k], conditional[k]]).to(device) for k in conditional}
    x: Tensor = noise.to(device) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        with torch.autocast(device.type, torch.bfloat16):
            times = time.to(device).expand(2 * len(x))
            found = model(torch.cat([x, x]), times, **both, return_dict=False)[0].float()
        plain, prompted = found.chunk(2)
        x = scheduler.step(plain + guidance * (prompted - plain), time, x).prev_sample
    return x


SCHEDULE_OF_SAMPLES = {
    **{k: v for k, v in SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")},
    "timestep_spacing": "trailing",
}
