"""Bytes <-> Pack: the strict reader and the canonical writer."""

from __future__ import annotations

from d3pack.format.ranges import Read, plan_reads, verify_reads
from d3pack.format.reader import Header, read, read_header
from d3pack.format.writer import pack_bytes, write

__all__ = [
    "Header",
    "Read",
    "pack_bytes",
    "plan_reads",
    "read",
    "read_header",
    "verify_reads",
    "write",
]
