"""d3pack: image-classification datasets as recipes for a diffusion backbone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from d3pack.errors import (
    BackboneError,
    D3MError,
    HubError,
    InvalidPackError,
    NotFoundError,
    SourceError,
    UsageError,
)
from d3pack.format import pack_bytes, read, write
from d3pack.pack import Coded, Ledger, Pack, Probes
from d3pack.recipe import BackboneRef, FileLock, Recipe

if TYPE_CHECKING:
    from d3pack.dataset import D3MDataset
    from d3pack.decode import Decoder

__version__ = "0.1.0"

__all__ = [
    "BackboneError",
    "BackboneRef",
    "Coded",
    "D3MDataset",
    "D3MError",
    "Decoder",
    "FileLock",
    "HubError",
    "InvalidPackError",
    "Ledger",
    "NotFoundError",
    "Pack",
    "Probes",
    "Recipe",
    "SourceError",
    "UsageError",
    "pack_bytes",
    "read",
    "write",
]

_LAZY = {"D3MDataset": "d3pack.dataset", "Decoder": "d3pack.decode"}


def __getattr__(name: str) -> Any:
    """Names that need torch are imported when they are asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
