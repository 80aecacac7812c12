"""Numbers as a person says them: counts, bytes, durations."""

from __future__ import annotations

import math


def count(number: int, what: str) -> str:
    """`1 probe`, `2 probes`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(nbytes: float) -> str:
    """Bytes in three digits: `57 B`, `9.86 kB`, `23.5 MB`."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if nbytes < 999.5:
            break
        nbytes, unit = nbytes / 1000, larger
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:,.0f} {unit}"


def duration(seconds: float) -> str:
    """`49 s`, `2 min 38 s`, `3 h 05 min`, `12.5 days`."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"
