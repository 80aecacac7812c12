"""What a pack is worth: students trained on it, and on real images of equal bytes."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
