"""Backbones: diffusion models behind one protocol, opened only when they are the locked ones."""

from __future__ import annotations

from d3pack.backbones.lock import cache_home
from d3pack.backbones.protocol import TEMPLATE, Backbone, Condition
from d3pack.backbones.resolve import (
    default_backbone,
    fetch_backbone,
    kinds,
    lock,
    lock_directory,
    open_backbone,
)

__all__ = [
    "TEMPLATE",
    "Backbone",
    "Condition",
    "cache_home",
    "default_backbone",
    "fetch_backbone",
    "kinds",
    "lock",
    "lock_directory",
    "open_backbone",
]
