"""Fields of a few bits, packed least significant bit first; every row starts at a byte."""

from __future__ import annotations

import numpy as np

from d3pack.format.coded import Array


def row_bytes(widths: tuple[int, ...], repeat: int) -> int:
    """Return the bytes of a row that holds `repeat` records of these field widths."""
    return (sum(widths) * repeat + 7) // 8


def pack(records: Array, widths: tuple[int, ...]) -> Array:
    """Pack records (rows, repeat, fields) into uint8 (rows, row_bytes)."""
    rows, repeat, _ = records.shape
    bits = np.concatenate(
        [
            (records[:, :, i, None].astype(np.uint32) >> np.arange(width, dtype=np.uint32)) & 1
            for i, width in enumerate(widths)
        ],
        axis=2,
    ).astype(np.uint8)
    return np.packbits(bits.reshape(rows, repeat * sum(widths)), axis=1, bitorder="little")


def unpack(data: Array, widths: tuple[int, ...], repeat: int) -> Array:
    """Unpack uint8 rows into uint32 records (rows, repeat, fields): the reverse of `pack`."""
    rows, total = data.shape[0], sum(widths)
    bits = np.unpackbits(data, axis=1, count=repeat * total, bitorder="little")
    bits = bits.reshape(rows, repeat, total)
    out = np.empty((rows, repeat, len(widths)), dtype=np.uint32)
    start = 0
    for i, width in enumerate(widths):
        powers = np.uint32(1) << np.arange(width, dtype=np.uint32)
        out[:, :, i] = bits[:, :, start : start + width] @ powers
        start += width
    return out


def spare_is_zero(data: Array, widths: tuple[int, ...], repeat: int) -> bool:
    """Return whether the bits after the last record of every row are zero."""
    used = sum(widths) * repeat % 8
    return used == 0 or not (data[:, -1] >> used).any()
