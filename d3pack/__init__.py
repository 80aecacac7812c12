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

if TYPE_CHECKING:
    from d3pack.dataset import D3MDataset
    from d3pack.decode import Decoder
    from d3pack.format import (
        BackboneRef,
        Coded,
        FileLock,
        Ledger,
        Pack,
        Probes,
        Recipe,
        pack_bytes,
        read,
        write,
    )
    from d3pack.hub import pull, push
    from d3pack.train import train_backbone

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
    "pull",
    "push",
    "read",
    "train_backbone",
    "write",
]

_ROOMS = {
    "dataset": ("D3MDataset",),
    "decode": ("Decoder",),
    "format": (
        "BackboneRef",
        "Coded",
        "FileLock",
        "Ledger",
        "Pack",
        "Probes",
        "Recipe",
        "pack_bytes",
        "read",
        "write",
    ),
    "hub": ("pull", "push"),
    "train": ("train_backbone",),
}
_LAZY = {name: f"d3pack.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Names that need torch or numpy are imported when they are asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
