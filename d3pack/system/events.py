"""What a long run tells: stages, counts and facts, to whoever listens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

Listener = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Events:
    """Hands each event to the listeners. Events say what happened; nothing ever reads them back."""

    listeners: list[Listener] = field(default_factory=list)
    _stage: str = ""
    _total: int = 0

    def emit(self, event: str, **facts: Any) -> None:
        for listener in self.listeners:
            listener({"event": event, **facts})

    def note(self, text: str) -> None:
        """One line for a person."""
        self.emit("note", text=text)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[None]:
        """A part of the work that counts to `total`."""
        self._stage, self._total = name, total
        began = time.monotonic()
        self.emit("stage", stage=name, total=total, unit=unit)
        yield
        self.emit("stage-done", stage=name, seconds=round(time.monotonic() - began, 2))

    def step(self, done: int, **facts: Any) -> None:
        """How far the stage is."""
        self.emit("step", stage=self._stage, done=done, total=self._total, **facts)


def json_lines(out: IO[str]) -> Listener:
    """Every event as one line of JSON."""

    def listen(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, sort_keys=True) + "\n")
        out.flush()

    return listen


def log_file(path: Path) -> Listener:
    """Every event with its time, appended to a file."""

    def listen(event: dict[str, Any]) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = " ".join(f"{k}={v}" for k, v in event.items() if k != "event")
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {event['event']} {facts}\n")

    return listen
