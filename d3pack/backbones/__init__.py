"""Backbones: diffusion models behind one protocol, opened only when they are the locked ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.backbones.adapter import apply_adapter, check_adapter
    from d3pack.backbones.autoencoder import Autoencoder, open_autoencoder, to_uint8
    from d3pack.backbones.dit import DiT
    from d3pack.backbones.levels import PREDICTIONS, Levels
    from d3pack.backbones.lock import FileProgress, cache_home, verify_files
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
    from d3pack.backbones.speed import enable_fast_kernels

__all__ = [
    "PREDICTIONS",
    "TEMPLATE",
    "Autoencoder",
    "Backbone",
    "Condition",
    "DiT",
    "FileProgress",
    "Levels",
    "apply_adapter",
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
    "to_uint8",
    "verify_files",
]

__getattr__ = lazy_names(
    __name__,
    {
        "adapter": ["apply_adapter", "check_adapter"],
        "autoencoder": ["Autoencoder", "open_autoencoder", "to_uint8"],
        "dit": ["DiT"],
        "levels": ["Levels", "PREDICTIONS"],
        "lock": ["FileProgress", "cache_home", "verify_files"],
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
        "speed": ["enable_fast_kernels"],
    },
)
