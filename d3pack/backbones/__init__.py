"""Backbones: diffusion models behind one protocol, opened only when they are the locked ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.backbones.levels import Levels
from d3pack.backbones.lock import cache_home
from d3pack.backbones.protocol import TEMPLATE, Backbone, Condition
from d3pack.backbones.resolve import (
    MINI_GUIDANCE,
    default_backbone,
    default_guidance,
    kinds,
    lock,
    lock_directory,
    mini_directory,
    open_backbone,
)
from d3pack.system.lazy import lazy_names

if TYPE_CHECKING:
    from d3pack.backbones.autoencoder import Autoencoder, open_autoencoder
    from d3pack.backbones.dit import DiT

__all__ = [
    "MINI_GUIDANCE",
    "TEMPLATE",
    "Autoencoder",
    "Backbone",
    "Condition",
    "DiT",
    "Levels",
    "cache_home",
    "default_backbone",
    "default_guidance",
    "kinds",
    "lock",
    "lock_directory",
    "mini_directory",
    "open_autoencoder",
    "open_backbone",
]

# these import diffusers
__getattr__ = lazy_names(
    __name__, {"autoencoder": ["Autoencoder", "open_autoencoder"], "dit": ["DiT"]}
)
