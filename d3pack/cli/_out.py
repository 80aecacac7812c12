"""How the command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

Progress = Callable[[int, int], None]  # done, in all
EVERY = 30.0  # seconds between lines where stderr is a file

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


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal: controls and escapes become visible."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Progress | None]:
    """A bar with images/s and the time left, on stderr; in a file a line now and then."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    import rich.progress
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")
        first: int | None = None

        def update(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            seconds = bar.tasks[0].elapsed or 0.0
            rate = f"{(done - first) / seconds:.1f} images/s" if seconds and done > first else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield update


def _lines(title: str) -> Progress:
    """Progress for a log."""
    began = shown = time.monotonic()
    first: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal first, shown
        first = done if first is None else first
        now = time.monotonic()
        if now - shown < EVERY or done == first:
            return
        shown = now
        rate = (done - first) / (now - began)
        left = timedelta(seconds=round((total - done) / rate))
        say(f"{title}: {done:,} of {total:,}, {rate:.1f} images/s, {left} left")

    return update


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
