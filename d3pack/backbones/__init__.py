"""Backbones: diffusion models behind one protocol, opened only with the locked files."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
