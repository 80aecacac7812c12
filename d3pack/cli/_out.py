"""How the command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Literal

Format = Literal["human", "json", "quiet"]


def emit(value: Any) -> None:
    """Print a result as JSON, one document."""
    json.dump(value, sys.stdout, indent=2, sort_keys=True, allow_nan=False)
    sys.stdout.write("\n")


def say(text: str) -> None:
    """Tell the person something; never part of the result."""
    print(text, file=sys.stderr)


def fail(error: Exception) -> None:
    """One line for an expected failure."""
    print(f"d3pack: {printable(str(error))}", file=sys.stderr)


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal: controls and escapes become visible."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


class _Voice(logging.Handler):
    """What the library reports (which commit was pulled, how few bytes were read)."""

    def emit(self, record: logging.LogRecord) -> None:
        say(printable(record.getMessage()))


_VOICE = _Voice()


def listen() -> None:
    """Say on stderr what d3pack logs."""
    logger = logging.getLogger("d3pack")
    logger.setLevel(logging.INFO)
    logger.addHandler(_VOICE)
