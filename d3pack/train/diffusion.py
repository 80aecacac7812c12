"""The denoiser stage. A `Conditioner` provides what the model takes besides latents and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn

from d3pack.backbones import Levels
from d3pack.system import mixed_precision
from d3pack.train.config import DiffusionConfig, LoopConfig
from d3pack.train.data import Latents, batch_rows, save_grid
from d3pack.train.loop import Batch
from d3pack.train.rounding import call_rounded

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

IN_FOUR: Batch = {"in_four": torch.ones(())}  # in a batch: matrices are rounded
HELD_OUT_TUPLES = 1024  # at most
HELD_OUT_LOG_SIGMA = (0.2, 1.3)  # the same for every preset, so that losses can be compared


class Conditioner(Protocol):
    """Turns labels into what the denoiser takes besides latents and time."""

    def for_training(
        self, labels: NDArray[np.int64], collage: NDArray[np.bool_], rng: np.random.Generator
    ) -> Batch:
        """Return keyword arguments of the denoiser for training: varied, and dropped at random."""
        ...

    def for_sampling(self, labels: Sequence[int]) -> tuple[Batch, Batch]:
        """Return the same for sampling, as (conditional, unconditional)."""
        ...


def build_unet(
    config: DiffusionConfig, latent_channels: int, latent_size: int, text_width: int
) -> UNet2DConditionModel:
    down = [("CrossAttnDownBlock2D" if a else "DownBlock2D") for a in config.attention]
    up = [("CrossAttnUpBlock2D" if a else "UpBlock2D") for a in reversed(config.attention)]
    unet = UNet2DConditionModel(
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
        # the pooled prompt joins the time embedding, so that the class reaches every layer
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return _for_training(unet)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Load existing weights to go on training."""
    return _for_training(UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32))


def _for_training(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Use plain attention: with so few tokens it trains a third faster on a CPU."""
    unet.set_attn_processor(AttnProcessor())
    return unet


class DenoiserConfig(Protocol):
    """The settings that a diffusion task reads."""

    @property
    def loop(self) -> LoopConfig: ...

    @property
    def log_sigma(self) -> tuple[float, float]: ...

    @property
    def guidance(self) -> float: ...


class DenoiserModule(nn.Module):
    """The loss of a denoiser at one noise level per sample; with `in_four`, of rounded matrices."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        in_four: Tensor | None = None,
        **condition: Tensor,
    ) -> dict[str, Tensor]:
        noised = self.levels.noised(latents, noise, times)
        model = self.model if in_four is None else partial(call_rounded, self.model)
        predicted = model(noised, times, **condition, return_dict=False)[0]
        target = self.levels.target(latents, noise, times)
        error = (predicted.float() - target).square().mean((1, 2, 3))
        return {"loss": error.mean(), "each": error}


class DiffusionTask:
    """Train a denoiser on latents."""

    name = "diffusion"

    def __init__(
        self,
        config: DenoiserConfig,
        build: Callable[[], nn.Module],
        latents: Latents,
        held_out: Latents,
        conditioner: Conditioner,
        decode: Callable[[Tensor], Tensor],
        preview_labels: Sequence[int],
        seed: int,
        levels: Levels,
        finish: float = 0.0,
    ) -> None:
        """Take what the stage needs.

        Args:
            finish: the last part of the steps, in which matrices are rounded to four bits; with
                one, losses on held-out images are those of rounded matrices from the start.
        """
        self.finish = finish
        self.config, self.build, self.latents, self.held_out = config, build, latents, held_out
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
            **self.conditioner.for_training(latents.labels[rows], latents.collage[rows], rng),
        }

    def batch(self, step: int, rank: int, world: int, progress: float) -> Batch:
        at = step * world + rank
        rows = batch_rows(len(self.latents.labels), self.config.loop.batch, at, self.seed)
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 4, at]))
        triples = self._triples(self.latents, rows, rng, self.config.log_sigma)
        return triples | (IN_FOUR if progress >= 1 - self.finish else {})

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Return the loss on fixed tuples of held-out image, noise, level and caption."""
        device = next(module.parameters()).device
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 5, 0]))
        rows = np.linspace(
            0, len(self.held_out.labels) - 1, min(HELD_OUT_TUPLES, len(self.held_out.labels))
        ).astype(np.int64)
        triples = self._triples(self.held_out, rows, rng, HELD_OUT_LOG_SIGMA)
        in_four = IN_FOUR if self.finish else {}
        total = 0.0
        for start in range(0, len(rows), 128):
            part = {k: v[start : start + 128].to(device) for k, v in triples.items()} | in_four
            with mixed_precision(device):
                total += float(module(**part)["each"].sum())
        return {"held_loss": total / len(rows)}

    @torch.no_grad()
    def preview(self, module: nn.Module, path: Path) -> None:
        assert isinstance(module, DenoiserModule)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.preview_labels), *self.latents.values.shape[1:])
        noise = torch.randn(shape, generator=generator)
        latents = sample(
            module.model,
            noise,
            *self.conditioner.for_sampling(self.preview_labels),
            guidance=self.config.guidance,
        )
        save_grid(self.decode(latents), path, columns=16)


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
    """Return latents made from noise, for previews; packs use the samplers of the format."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE_OF_SAMPLES)
    scheduler.set_timesteps(steps)
    device = next(model.parameters()).device
    both = {k: torch.cat([unconditional[k], conditional[k]]).to(device) for k in conditional}
    x: Tensor = noise.to(device) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        with mixed_precision(device):
            times = time.to(device).expand(2 * len(x))
            predicted = model(torch.cat([x, x]), times, **both, return_dict=False)[0].float()
        plain, prompted = predicted.chunk(2)
        x = scheduler.step(plain + guidance * (prompted - plain), time, x).prev_sample
    return x


SCHEDULE_OF_SAMPLES = {
    **{k: v for k, v in SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")},
    "timestep_spacing": "trailing",
}
