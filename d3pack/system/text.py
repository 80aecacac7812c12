"""Numbers as a person says them: counts, bytes, durations."""

from __future__ import annotations

import math
import re

from d3pack.errors import UsageError


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


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Return the seconds of `90m`, `1.5h` or `600s`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"invalid duration {text!r}: expected a time such as 600s, 90m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]
