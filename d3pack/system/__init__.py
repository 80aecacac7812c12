"""What every room stands on: files, locks, devices, progress, settings, text, journals."""

from __future__ import annotations

from d3pack.system.lazy import attach

__all__, __getattr__ = attach(__name__, __file__)
