"""d3pack: image-classification datasets as recipes for a diffusion backbone."""

from __future__ import annotations

__version__ = "0.1.0"
