"""Bytes <-> Pack: the strict reader and the canonical writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system.lazy import lazy_names

if TYPE_CHECKING:
    from d3pack.format.codecs import decode_labels
    from d3pack.format.coded import Coded
    from d3pack.format.pack import EMBEDDED, Ledger, Pack, Probes
    from d3pack.format.ranges import (
        Read,
        header_size,
        outline,
        plan_names,
        plan_reads,
        verify_names,
        verify_reads,
    )
    from d3pack.format.reader import Header, read, read_header
    from d3pack.format.recipe import BackboneRef, FileLock, Recipe
    from d3pack.format.writer import pack_bytes, write

__all__ = [
    "EMBEDDED",
    "BackboneRef",
    "Coded",
    "FileLock",
    "Header",
    "Ledger",
    "Pack",
    "Probes",
    "Read",
    "Recipe",
    "decode_labels",
    "header_size",
    "outline",
    "pack_bytes",
    "plan_names",
    "plan_reads",
    "read",
    "read_header",
    "verify_names",
    "verify_reads",
    "write",
]

__getattr__ = lazy_names(
    __name__,
    {
        "codecs": ["decode_labels"],
        "coded": ["Coded"],
        "pack": ["EMBEDDED", "Ledger", "Pack", "Probes"],
        "ranges": [
            "Read",
            "header_size",
            "outline",
            "plan_names",
            "plan_reads",
            "verify_names",
            "verify_reads",
        ],
        "reader": ["Header", "read", "read_header"],
        "recipe": ["BackboneRef", "FileLock", "Recipe"],
        "writer": ["pack_bytes", "write"],
    },
)
