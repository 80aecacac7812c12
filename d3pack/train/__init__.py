"""Training of backbones: from images to a complete text-to-image model, or a DiT of one source."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
