"""What is in a pack, to look at: a contact sheet (PNG) or one self-contained page (HTML)."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
