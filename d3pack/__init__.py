"""d3pack: image-classification datasets as recipes for a diffusion backbone."""

from __future__ import annotations

from d3pack.system import attach

__version__ = "0.1.0"
__all__, __getattr__ = attach(__name__, __file__)
