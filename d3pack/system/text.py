"""Counts, sizes and durations as text, text as sizes and durations, and text made safe to print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d3pack.errors import UsageError

_SIZE_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_TIME_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def count(number: int, what: str) -> str:
    """Return `1 probe`, `2 probes`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(nbytes: float) -> str:
    """Return bytes in three digits: `57 B`, `9.86 kB`, `23.5 MB`."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if nbytes < 999.5:
            break
        nbytes, unit = nbytes / 1000, larger
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Return `49 s`, `2 min 38 s`, `3 h 05 min`, `12.5 days`."""
    rounded = math.ceil(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    if rounded < 48 * 3600:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"


def clock(seconds: float) -> str:
    """Return `0:01:10`, the time left of a progress bar."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def parse_size(text: str) -> int:
    """Return the bytes of `20KB`, `1.5MB`, `6000`: KB is 1000 bytes, KiB 1024."""
    number = text.strip().rstrip("BbIiKkMmGg")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        nbytes = int(float(number) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise UsageError(f"invalid size {text!r}: expected bytes such as 20KB, 64KiB or 1.5MB")
    return nbytes


def parse_duration(text: str) -> float:
    """Return the seconds of `90m`, `1.5h` or `600s`."""
    match = _TIME.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"invalid duration {text!r}: expected a time such as 600s, 90m or 1.5h")
    return float(match[1]) * _TIME_UNITS[match[2]]


def printable(text: str) -> str:
    """Return text from a file made safe for a terminal: control characters become visible."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return nested mappings and lists as dotted names and texts: `settings.steps`, `30`."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif not isinstance(value, list | tuple):
        return [(name, f"{value:g}" if isinstance(value, float) else str(value))]
    elif any(isinstance(item, Mapping | list | tuple) for item in value):
        items = [(f"{name}.{i}", item) for i, item in enumerate(value)]
    else:
        return [(name, ", ".join(map(str, value)))]
    return [pair for inner, item in items for pair in flatten(item, inner)]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """Return a Markdown table of cells that are Markdown already.

    The last `numbers` columns are figures.
    """
    rule = "---|" * (len(head) - numbers) + "---:|" * numbers
    lines = [f"| {' | '.join(head)} |", f"|{rule}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Return Markdown that shows a text from a file as it is: no links, mentions or layout.

    Control characters, and those that change the direction of text, are shown as escapes.
    """
    text = re.sub(r"([\\`*_{}\[\]<>|#$~&!:@])", r"\\\1", printable(text))
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text)


def markdown_code(text: str) -> str:
    """Return Markdown that shows a text from a file as code, also in a table."""
    text = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"
