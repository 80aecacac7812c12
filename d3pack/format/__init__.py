"""The .d3m format: bytes to Pack and back, whole or by ranges. Needs NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.format.canonical import to_plain
    from d3pack.format.coded import Array, Coded
    from d3pack.format.pack import EMBEDDED, Ledger, Pack, Probes, carried_files
    from d3pack.format.ranges import (
        ByteRange,
        class_ranges,
        names_range,
        outline,
        read_class_ranges,
        read_names,
    )
    from d3pack.format.reader import Header, header_length, read, read_header
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
    "ByteRange",
    "Coded",
    "DType",
    "FileLock",
    "Header",
    "Ledger",
    "Pack",
    "Probes",
    "Recipe",
    "Sampler",
    "carried_files",
    "class_ranges",
    "directory_revision",
    "header_length",
    "names_range",
    "outline",
    "pack_bytes",
    "read",
    "read_class_ranges",
    "read_header",
    "read_names",
    "table_rows",
    "to_plain",
    "write",
]

__getattr__ = lazy_names(
    __name__,
    {
        "canonical": ["to_plain"],
        "coded": ["Array", "Coded"],
        "pack": ["EMBEDDED", "Ledger", "Pack", "Probes", "carried_files"],
        "ranges": [
            "ByteRange",
            "class_ranges",
            "names_range",
            "outline",
            "read_class_ranges",
            "read_names",
        ],
        "reader": ["Header", "header_length", "read", "read_header"],
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
