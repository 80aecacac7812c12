"""Students: networks, and protocols that train and test them, that show what images teach."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
