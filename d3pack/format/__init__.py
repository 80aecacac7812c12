"""Bytes to Pack and back: the strict reader, the canonical writer, ranges and codecs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.format.canonical import to_plain
    from d3pack.format.carried import carried_files
    from d3pack.format.coded import Array, Coded
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
    from d3pack.format.recipe import (
        SAMPLERS,
        BackboneRef,
        DType,
        FileLock,
        Recipe,
        Sampler,
        directory_revision,
        table_rows,
    )
    from d3pack.format.writer import pack_bytes, write

__all__ = [
    "EMBEDDED",
    "SAMPLERS",
    "Array",
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
    "carried_files",
    "directory_revision",
    "header_size",
    "outline",
    "pack_bytes",
    "plan_names",
    "plan_reads",
    "read",
    "read_header",
    "table_rows",
    "to_plain",
    "verify_names",
    "verify_reads",
    "write",
]

__getattr__ = lazy_names(
    __name__,
    {
        "canonical": ["to_plain"],
        "carried": ["carried_files"],
        "coded": ["Array", "Coded"],
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
        "recipe": [
            "BackboneRef",
            "DType",
            "FileLock",
            "Recipe",
            "SAMPLERS",
            "Sampler",
            "directory_revision",
            "table_rows",
        ],
        "writer": ["pack_bytes", "write"],
    },
)
