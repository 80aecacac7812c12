"""D3MDataset: a pack as an ordinary PyTorch dataset, decoded once and served from a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.dataset.dataset import D3MDataset, LabelTeacher
    from d3pack.dataset.disk import (
        StoreEntry,
        StoreIdentity,
        list_stores,
        remove_store,
        store_in_use,
        verify_store,
    )
    from d3pack.dataset.loader import D3MLoader
    from d3pack.dataset.order import BatchOrder
    from d3pack.dataset.samples import TransformError

__all__ = [
    "BatchOrder",
    "D3MDataset",
    "D3MLoader",
    "LabelTeacher",
    "StoreEntry",
    "StoreIdentity",
    "TransformError",
    "list_stores",
    "remove_store",
    "store_in_use",
    "verify_store",
]

# `d3pack cache` lists stores without importing torch
__getattr__ = lazy_names(
    __name__,
    {
        "dataset": ["D3MDataset", "LabelTeacher"],
        "disk": [
            "StoreEntry",
            "StoreIdentity",
            "list_stores",
            "remove_store",
            "store_in_use",
            "verify_store",
        ],
        "loader": ["D3MLoader"],
        "order": ["BatchOrder"],
        "samples": ["TransformError"],
    },
)
