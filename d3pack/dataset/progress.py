"""What the dataset says on stderr: one line for a choice, a moving line for a long decode."""

from __future__ import annotations

import sys
import time

_QUIET_START = 2.0  # seconds of work before a line appears
_EVERY = 0.5  # seconds between updates of a terminal line
_EVERY_LOG = 30.0  # the same where stderr is a file


def say(text: str) -> None:
    """One line for the person."""
    print(f"d3pack: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Images a second and time left of a first decode, counted over the time spent decoding."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._busy = 0.0
        self._decoded = 0
        self._shown = 0.0
        self._open_line = False

    def add(self, images: int, seconds: float, ready: int | None) -> None:
        """`images` were decoded in `seconds`; `ready` of all are there now (None: none is kept)."""
        self._busy += seconds
        self._decoded += images
        terminal = sys.stderr.isatty()
        done = ready is not None and ready >= self._total
        if self._quiet or self._busy < _QUIET_START:
            return
        now = time.monotonic()
        if not done and now - self._shown < (_EVERY if terminal else _EVERY_LOG):
            return
        self._shown = now
        rate = self._decoded / self._busy
        if ready is None:
            text = f"decoded {self._decoded:,} images, {rate:.1f} images/s"
        else:
            text = f"decoded {ready:,} of {self._total:,} images, {rate:.1f} images/s"
            text += "" if done else f", {_clock((self._total - ready) / rate)} left"
        if terminal:
            print(f"\r\x1b[Kd3pack: {text}", end="\n" if done else "", file=sys.stderr, flush=True)
        else:
            say(text)
