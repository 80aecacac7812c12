"""The .d3m format: bytes to Pack and back, whole or by ranges. Needs NumPy only."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
