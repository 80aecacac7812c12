"""Packs on the Hugging Face Hub, through `huggingface_hub` and nothing else."""

from __future__ import annotations

from d3pack.hub.address import Address, is_address, parse

__all__ = ["Address", "is_address", "parse"]
