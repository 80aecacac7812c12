"""Bytes <-> Pack: the strict reader and the canonical writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system.lazy import lazy_names

if TYPE_CHECKING:
    from d3pack.format.codecs import (
        decode_adapter,
        decode_files,
        decode_labels,
        decode_picks,
        decode_prompts,
        encode_adapter,
        encode_files,
        encode_labels,
        encode_picks,
        encode_prompts,
    )
    from d3pack.format.coded import Coded
    from d3pack.format.pack import EMBEDDED, Ledger, Pack, Probes
    from d3pack.format.ranges import Read, plan_reads, verify_reads
    from d3pack.format.reader import Header, read, read_header
    from d3pack.format.recipe import BackboneRef, DType, FileLock, Recipe, Sampler
    from d3pack.format.writer import pack_bytes, write

__all__ = [
    "EMBEDDED",
    "BackboneRef",
    "Coded",
    "DType",
    "FileLock",
    "Header",
    "Ledger",
    "Pack",
    "Probes",
    "Read",
    "Recipe",
    "Sampler",
    "decode_adapter",
    "decode_files",
    "decode_labels",
    "decode_picks",
    "decode_prompts",
    "encode_adapter",
    "encode_files",
    "encode_labels",
    "encode_picks",
    "encode_prompts",
    "pack_bytes",
    "plan_reads",
    "read",
    "read_header",
    "verify_reads",
    "write",
]

__getattr__ = lazy_names(
    __name__,
    {
        "coded": ["Coded"],
        "codecs": [
            "decode_adapter",
            "decode_files",
            "decode_labels",
            "decode_picks",
            "decode_prompts",
            "encode_adapter",
            "encode_files",
            "encode_labels",
            "encode_picks",
            "encode_prompts",
        ],
        "pack": ["EMBEDDED", "Ledger", "Pack", "Probes"],
        "ranges": ["Read", "plan_reads", "verify_reads"],
        "reader": ["Header", "read", "read_header"],
        "recipe": ["BackboneRef", "DType", "FileLock", "Recipe", "Sampler"],
        "writer": ["pack_bytes", "write"],
    },
)
