"""Packs on the Hugging Face Hub, through `huggingface_hub` and nothing else."""

from __future__ import annotations

from d3pack.system import attach

__all__, __getattr__ = attach(__name__, __file__)
