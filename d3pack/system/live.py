"""The live view of a run: stage, what is done, samples a second, time left, loss falling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from d3pack.system.events import Listener

SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of the loss curve


class View:
    """Turns events into a few lines that stay in place."""

    def __init__(self) -> None:
        self._stage, self._unit = "", ""
        self._began, self._first, self._first_samples = 0.0, 0, 0
        self._step: dict[str, Any] = {}
        self._losses: list[float] = []
        self.notes: list[str] = []

    def listen(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "stage":
            self._stage, self._unit = event["stage"], event["unit"]
            self._began, self._losses = time.monotonic(), []
            self._step = {"done": 0, "total": event["total"]}
            self._first = self._first_samples = -1
        elif kind == "step":
            if self._first < 0:  # a resumed stage does not begin at nothing
                self._first, self._first_samples = event["done"], event.get("samples", 0)
                self._began = time.monotonic()
            self._step = event
            if "loss" in event:
                self._losses.append(event["loss"])
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind == "plan":
            self.notes += event["lines"]

    def __rich__(self) -> Group:
        lines: list[Any] = [Text(note, style="dim") for note in self.notes[-8:]]
        if self._stage:
            done, total = self._step["done"], max(1, self._step["total"])
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=total, completed=done, width=24)
            row.add_row(
                Text(self._stage, style="bold"), bar, f"{done}/{total} {self._unit}", *self._rates()
            )
            lines.append(row)
        if len(self._losses) > 1:
            lines.append(
                Text(f"loss {self._losses[0]:.4f} {spark(self._losses)} {self._losses[-1]:.4f}")
            )
        return Group(*lines)

    def _rates(self) -> list[str]:
        spent = time.monotonic() - self._began
        gained = self._step["done"] - self._first
        found = []
        if "samples" in self._step and spent > 0.5 and self._first >= 0:
            found.append(f"{(self._step['samples'] - self._first_samples) / spent:.0f} samples/s")
        if gained > 0 and spent > 0.5:
            left = spent / gained * (self._step["total"] - self._step["done"])
            found.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return found


def spark(values: list[float]) -> str:
    """A curve in block characters, newest at the right."""
    shown = values[:: max(1, -(-len(values) // WIDTH))]
    low, high = min(shown), max(shown)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[int((value - low) * scale)] for value in shown)


@contextmanager
def live_view() -> Iterator[Listener]:
    """On a terminal a view that stays in place; elsewhere a line a stage. Both on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:

        def plain(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                console.print(event["text"], markup=False, highlight=False)
            elif event["event"] == "plan":
                console.print("\n".join(event["lines"]), markup=False, highlight=False)
            elif event["event"] == "stage":
                console.print(
                    f"{event['stage']} ({event['total']} {event['unit']})", highlight=False
                )

        yield plain
        return
    view = View()
    with Live(view, console=console, refresh_per_second=4):
        yield view.listen
