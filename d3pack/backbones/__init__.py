"""Backbones: diffusion models behind one protocol, opened only with the locked files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.backbones.adapter import apply_adapter, check_adapter
    from d3pack.backbones.autoencoder import (
        Autoencoder,
        open_autoencoder,
        replace_autoencoder,
        to_uint8,
    )
    from d3pack.backbones.dit import DiT
    from d3pack.backbones.kernels import enable_fast_kernels
    from d3pack.backbones.levels import PREDICTIONS, Levels, Timesteps
    from d3pack.backbones.loading import Files, build
    from d3pack.backbones.lock import FileProgress, Layout, Part, cache_home, verify_files
    from d3pack.backbones.protocol import TEMPLATE, Backbone, Condition
    from d3pack.backbones.resolve import (
        default_backbone,
        fetch_backbone,
        kinds,
        locate_files,
        lock_backbone,
        lock_directory,
        mini_directory,
        open_backbone,
    )
    from d3pack.backbones.stable_diffusion import StableDiffusion
    from d3pack.backbones.text import TextEncoder

__all__ = [
    "PREDICTIONS",
    "TEMPLATE",
    "Autoencoder",
    "Backbone",
    "Condition",
    "DiT",
    "FileProgress",
    "Files",
    "Layout",
    "Levels",
    "Part",
    "StableDiffusion",
    "TextEncoder",
    "Timesteps",
    "apply_adapter",
    "build",
    "cache_home",
    "check_adapter",
    "default_backbone",
    "enable_fast_kernels",
    "fetch_backbone",
    "kinds",
    "locate_files",
    "lock_backbone",
    "lock_directory",
    "mini_directory",
    "open_autoencoder",
    "open_backbone",
    "replace_autoencoder",
    "to_uint8",
    "verify_files",
]

__getattr__ = lazy_names(
    __name__,
    {
        "adapter": ["apply_adapter", "check_adapter"],
        "autoencoder": ["Autoencoder", "open_autoencoder", "replace_autoencoder", "to_uint8"],
        "dit": ["DiT"],
        "kernels": ["enable_fast_kernels"],
        "levels": ["Levels", "PREDICTIONS", "Timesteps"],
        "loading": ["Files", "build"],
        "lock": ["FileProgress", "Layout", "Part", "cache_home", "verify_files"],
        "protocol": ["Backbone", "Condition", "TEMPLATE"],
        "resolve": [
            "default_backbone",
            "fetch_backbone",
            "kinds",
            "locate_files",
            "lock_backbone",
            "lock_directory",
            "mini_directory",
            "open_backbone",
        ],
        "stable_diffusion": ["StableDiffusion"],
        "text": ["TextEncoder"],
    },
)
