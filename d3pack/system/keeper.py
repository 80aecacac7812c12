"""The state of an inversion in the journal: written when it is worth the disk."""

from __future__ import annotations

import time

from d3pack.system.journal import Arrays, Journal

EVERY = 5.0  # seconds between writes; a killed run repeats at most this and one stretch of steps


class JournalKeeper:
    """Keeps state under one name."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        self._last = time.monotonic()

    def load(self) -> Arrays | None:
        found = self._journal.load(self._name)
        return None if found is None else found[0]

    def save(self, state: Arrays, *, last: bool = False) -> None:
        if last or time.monotonic() - self._last >= EVERY:
            self._journal.save(self._name, state, {})
            self._last = time.monotonic()
