"""How the command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from d3pack.system import printable

if TYPE_CHECKING:
    from d3pack.system import Listener


def emit(value: Any) -> None:
    """Print a result as JSON, one document."""
    json.dump(value, sys.stdout, indent=2, sort_keys=True, allow_nan=False)
    sys.stdout.write("\n")


def show(text: str) -> None:
    """Print a line of the result; what came from a file cannot disturb the terminal."""
    print(printable(text))


def say(text: str) -> None:
    """Print a message that is not part of the result."""
    print(printable(text), file=sys.stderr)


def progress(format: str) -> AbstractContextManager[Listener]:
    """Return a view of the events of a run: live, as lines of JSON, or none."""
    from d3pack.system import json_lines, live_view

    if format == "quiet":
        return nullcontext(lambda event: None)
    return live_view() if format == "human" else nullcontext(json_lines(sys.stdout))


def fail(error: Exception) -> None:
    """Print an expected failure in one line."""
    say(f"d3pack: {error}")


_after_interrupt = ""


def if_interrupted(hint: str) -> None:
    """What to tell a person who stops the verb that begins here."""
    global _after_interrupt
    _after_interrupt = hint


def interrupted() -> None:
    """The answer to Ctrl-C; a second one does not disturb the leaving."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say("; ".join(filter(None, ("interrupted", _after_interrupt))))


class _Voice(logging.Handler):
    """What the library reports (which commit was pulled, how few bytes were read)."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


_VOICE = _Voice()


def listen() -> None:
    """Say on stderr what d3pack logs."""
    logger = logging.getLogger("d3pack")
    logger.setLevel(logging.INFO)
    logger.addHandler(_VOICE)
