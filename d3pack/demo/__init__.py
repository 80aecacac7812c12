"""The demo: all of d3pack on real digits, and photographs from a pack that comes with it."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
