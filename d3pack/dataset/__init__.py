"""D3MDataset: a pack as an ordinary PyTorch dataset, decoded once and served from a store."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3pack.dataset.dataset import D3MDataset
    from d3pack.dataset.loader import D3MLoader
    from d3pack.dataset.order import BatchOrder
    from d3pack.dataset.transforms import TransformError

__all__ = ["BatchOrder", "D3MDataset", "D3MLoader", "TransformError"]

# `d3pack cache` looks at the stores without importing torch, so the classes come when asked for.
_HOMES = {
    "BatchOrder": "order",
    "D3MDataset": "dataset",
    "D3MLoader": "loader",
    "TransformError": "transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
