"""D3MDataset: a pack as an ordinary PyTorch dataset, decoded once and served from a store."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
