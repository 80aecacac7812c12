"""Teachers: classifiers that choose images and answer with soft labels."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
