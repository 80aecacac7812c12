"""Seeded damage to bytes and to JSON."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 255, 2**31, 2**53, 2**64, -(2**63), 1e308, -0.0, 1e-300,
    float("nan"), float("inf"), "", "a", "\0", "\x1b]52;c;\x07", "../..", "💥" * 40, "9" * 400,
    [], {}, [[]], [None], {"": None}, ["x"] * 70, [[[[[[1]]]]]], {"type": "Replace"},
)  # fmt: skip
_WORDS = (b"\0" * 8, b"\xff" * 8, b"{", b'"', b"]", b"PK\x03\x04", b"\x80\x02", b"GIF89a")


def mutate_bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Return bytes with one to four faults: flips, cuts, copies, numbers, parts of other seeds."""
    value = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(value) + 1)
        length = min(len(value) - at, 1 << rng.randrange(12))
        match rng.randrange(8):
            case 0 | 1:
                if at < len(value):
                    value[at] ^= 1 << rng.randrange(8)
            case 2:
                del value[at : at + length]
            case 3:
                value[at:at] = value[at : at + length]
            case 4:
                number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), rng.randrange(1 << 16)))
                value[at : at + 4] = struct.pack(rng.choice("<>") + "i", number)
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                value[at : at + length] = other[start : start + length]
            case 6:
                value[at:at] = rng.choice(_WORDS)
            case 7:
                if at < len(value):
                    value[at] = rng.randrange(256)
    return bytes(value)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return JSON with one to three values replaced, removed, repeated or renamed.

    The value that was given stays as it is: what changes is copied, with what holds it.
    """
    root = [value]
    for _ in range(rng.randint(1, 3)):
        holder, key = _place(root, rng, own=True)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(_VALUES))
            case 3:
                if holder is not root:
                    del holder[key]
            case 4:
                other, name = _place(root, rng)
                holder[key] = copy.deepcopy(other[name])
            case 5:
                if isinstance(holder[key], int | float):
                    holder[key] = holder[key] * rng.choice((-1, 0.5, 2, 1000, 2**40))
    return root[0]


def dumped(value: Any) -> bytes:
    """Return JSON as bytes; NaN and infinity stay, as Python writes and reads them."""
    return json.dumps(value).encode()


def _place(root: list[Any], rng: random.Random, *, own: bool = False) -> tuple[Any, Any]:
    """Return a holder and a key of it, any of the tree; `own`: holders on the way become copies."""
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], list | dict) and holder[key] and rng.random() < 0.8:
        if own:
            holder[key] = copy.copy(holder[key])
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    return holder, key
