"""Codecs: how prompts, picks, labels, adapters and files are stored.

The set is closed: a codec's name means the same bytes for every reader. To add one, write its class
and a line in `table.py`.
"""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
