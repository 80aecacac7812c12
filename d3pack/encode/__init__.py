"""From real images to a pack: settings, methods, and the driver that runs them."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
