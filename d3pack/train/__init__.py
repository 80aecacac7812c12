"""Training of backbones: from images to a complete text-to-image model, or a DiT of one source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.train.config import PRESETS, LoopConfig, TrainConfig
    from d3pack.train.data import (
        Latents,
        Photos,
        batch_rows,
        cached_latents,
        load_photos,
    )
    from d3pack.train.diffusion import SCHEDULE, DenoiserModule, DiffusionTask
    from d3pack.train.dit import (
        DIT_MODELS,
        EXPORTED,
        VAE_FILES,
        ClassConditioner,
        DiTConfig,
        build_dit,
        export_dit,
    )
    from d3pack.train.export import write_lock
    from d3pack.train.loop import run_stage
    from d3pack.train.run import train_backbone
    from d3pack.train.settings import STAGES, TrainSettings

__all__ = [
    "DIT_MODELS",
    "EXPORTED",
    "PRESETS",
    "SCHEDULE",
    "STAGES",
    "VAE_FILES",
    "ClassConditioner",
    "DenoiserModule",
    "DiTConfig",
    "DiffusionTask",
    "Latents",
    "LoopConfig",
    "Photos",
    "TrainConfig",
    "TrainSettings",
    "batch_rows",
    "build_dit",
    "cached_latents",
    "export_dit",
    "load_photos",
    "run_stage",
    "train_backbone",
    "write_lock",
]

__getattr__ = lazy_names(
    __name__,
    {
        "config": ["PRESETS", "LoopConfig", "TrainConfig"],
        "data": ["Latents", "Photos", "batch_rows", "cached_latents", "load_photos"],
        "diffusion": ["SCHEDULE", "DenoiserModule", "DiffusionTask"],
        "dit": [
            "DIT_MODELS",
            "EXPORTED",
            "VAE_FILES",
            "ClassConditioner",
            "DiTConfig",
            "build_dit",
            "export_dit",
        ],
        "export": ["write_lock"],
        "loop": ["run_stage"],
        "run": ["train_backbone"],
        "settings": ["STAGES", "TrainSettings"],
    },
)
