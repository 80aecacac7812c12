"""What a long run reports, and how a person or a program sees it.

A run hands events to listeners: stages, counts and notes. On a terminal a few lines stay in place;
in a log there is a line for a stage and one every half minute; a program reads JSON lines. Work of
a single stage has `progress_bar`, which draws the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from d3pack.system.text import clock, duration, printable

if TYPE_CHECKING:
    from rich.console import Group

Listener = Callable[[dict[str, Any]], None]
Counter = Callable[[int, int], None]  # done, total

LOG_SECONDS = 30.0  # between lines where stderr is a file
_LONG_PIECE = 10.0  # seconds of a piece of work, after which its parts are told
_SPARKS = "▁▂▃▄▅▆▇█"
_CURVE = 40  # columns of the loss curve
_NOTES = 8  # lines that stay in view
_STAGES = 8  # of several workers


@dataclass(slots=True)
class Events:
    """Hands each event to the listeners. Events say what happened; nothing reads them back."""

    listeners: list[Listener] = field(default_factory=list)
    _stage: str = ""
    _total: int = 0

    def emit(self, event: str, **facts: Any) -> None:
        """Report an event of any kind."""
        for listener in self.listeners:
            listener({"event": event, **facts})

    def note(self, text: str) -> None:
        """Report one line for a person."""
        self.emit("note", text=text)

    @contextmanager
    def stage(
        self, name: str, total: int, unit: str, *, part: str = "", done: int | None = None
    ) -> Iterator[None]:
        """Report a stage of the work that counts to `total`.

        Args:
            name: what is done.
            total: how many units there are.
            unit: what is counted.
            part: what an estimate of the run calls this stage.
            done: how many are there now, where all shards of a run count to one total.
        """
        self._stage, self._total = name, total
        began = time.monotonic()
        shared = {} if done is None else {"done": done}
        self.emit("stage", stage=name, total=total, unit=unit, part=part, **shared)
        yield
        self.emit("stage-done", stage=name, seconds=round(time.monotonic() - began, 2))

    def step(self, done: int, **facts: Any) -> None:
        """Report how far the stage is."""
        self.emit("step", stage=self._stage, done=done, total=self._total, **facts)


def json_lines(out: IO[str]) -> Listener:
    """Return a listener that writes every event as one line of JSON."""

    def listen(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, sort_keys=True) + "\n")
        out.flush()

    return listen


def log_file(path: Path, seconds: float = 10.0) -> Listener:
    """Return a listener that appends events, with their time, to a file.

    Steps are left out until `seconds` after the last one that was written, but for the step that
    ends a stage.
    """
    written = -math.inf

    def listen(event: dict[str, Any]) -> None:
        nonlocal written
        if event["event"] == "step" and event["done"] != event["total"]:
            if time.monotonic() - written < seconds:
                return
            written = time.monotonic()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = " ".join(f"{k}={v}" for k, v in event.items() if k != "event")
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {event['event']} {facts}\n")

    return listen


def throttled(update: Counter, seconds: float = 0.5) -> Counter:
    """Return a counter that passes on the end, and what comes `seconds` after the last report."""
    last = time.monotonic()

    def throttle(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > seconds or done == total:
            update(done, total)
            last = time.monotonic()

    return throttle


class _Speed:
    """Units a second since the first count: a resumed stage does not begin at zero."""

    def __init__(self) -> None:
        self.now = self._began = 0.0
        self.first = self.done = -1

    def update(self, done: int) -> None:
        """Take the count of this moment."""
        self.now, self.done = time.monotonic(), done
        if self.first < 0:
            self._began, self.first = self.now, done

    def per_second(self, gained: int) -> float:
        """The speed at which something grew by `gained`; 0.0 where it is too early to say."""
        spent = self.now - self._began
        return gained / spent if spent > 0.5 else 0.0

    def texts(self, total: int, unit: str) -> list[str]:
        """Speed and time left."""
        speed = self.per_second(self.done - self.first)
        if speed <= 0:
            return []
        left = clock((total - self.done) / speed)
        return [
            f"{speed:.1f} {unit}/s" if speed >= 0.1 else f"{speed:.2g} {unit}/s",
            f"{left} left",
        ]


class _Whole:
    """How far a run is, whose parts were estimated before it began, in their order."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._before = self._now = 0.0  # seconds of the parts before, and of the one that goes on

    def listen(self, event: dict[str, Any]) -> None:
        """Take an event; a part that begins ends those before it, and other stages the last."""
        if event["event"] == "estimate":
            self._parts = event["seconds"]
        elif event["event"] == "stage":
            self._before, self._now = self._before + self._now, 0.0
            names = list(self._parts)
            if event.get("part") in names:
                at = names.index(event["part"])
                before = sum(self._parts[name] for name in names[:at])
                if before >= self._before:
                    self._before, self._now = before, self._parts[names[at]]

    def text(self, share: float) -> str:
        """The share of all parts that is done, where `share` of the one that goes on is."""
        total = sum(self._parts.values())
        done = self._before + share * self._now
        return f"{100 * done / total:.0f} % of all" if total > 0 else ""


class _Row:
    """A stage in the view."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.stage, self.unit = event["stage"], event["unit"]
        self.step: dict[str, Any] = {"done": 0, "total": event["total"]}
        self.losses: list[float] = []
        self.finished = False
        self._speed, self._first_samples = _Speed(), 0

    def take(self, event: dict[str, Any]) -> None:
        """Take a step."""
        self.step = event
        if self._speed.first < 0:
            self._first_samples = event.get("samples", 0)
        self._speed.update(event["done"])
        if "loss" in event:
            self.losses.append(event["loss"])

    def texts(self) -> list[str]:
        """Speed and time left."""
        texts = self._speed.texts(self.step["total"], self.unit)
        if texts and "samples" in self.step:
            samples = self._speed.per_second(self.step["samples"] - self._first_samples)
            texts[0] = f"{samples:.0f} samples/s"
        return texts


class View:
    """Turns events into a few lines that stay in place: stage, count, speed, time left, loss.

    Workers may be at several stages at the same time; else there is one, and the next takes its
    place.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._newest = ""
        self._whole = _Whole()
        self.notes: list[str] = []

    def listen(self, event: dict[str, Any]) -> None:
        """Take an event."""
        kind = event["event"]
        self._whole.listen(event)
        if kind == "stage":
            alone = "shard" not in event
            self._rows = {n: row for n, row in self._rows.items() if not (alone or row.finished)}
            self._newest = event["stage"]
            self._rows[self._newest] = _Row(event)
        elif kind == "step":
            self._rows[event.get("stage", self._newest)].take(event)
        elif kind == "stage-done":
            if event["stage"] in self._rows:
                self._rows[event["stage"]].finished = True
        else:
            self.notes += _lines(event)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        lines: list[Any] = [Text(note, style="dim") for note in self.notes[-_NOTES:]]
        grid = Table.grid(padding=(0, 1))
        for row in [*self._rows.values()][-_STAGES:]:
            done, total = row.step["done"], max(1, row.step["total"])
            bar = ProgressBar(total=total, completed=done, width=24)
            count = f"{done}/{total} {row.unit}"
            whole = self._whole.text(done / total) if len(self._rows) == 1 else ""
            texts = [*row.texts(), *filter(None, [whole])]
            grid.add_row(Text(row.stage, style="bold"), bar, count, *texts)
        if self._rows:
            lines.append(grid)
            losses = self._rows[self._newest].losses
            if len(losses) > 1:
                lines.append(Text(f"loss {losses[0]:.4f} {spark(losses)} {losses[-1]:.4f}"))
        return Group(*lines)


def spark(values: list[float]) -> str:
    """Return a curve in block characters, newest at the right."""
    shown = values[:: max(1, -(-len(values) // _CURVE))]
    low, high = min(shown), max(shown)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[int((value - low) * scale)] for value in shown)


class _Log:
    """Writes events as lines to stderr: one for a stage, then one every half minute."""

    def __init__(self, *, announce: bool = True) -> None:
        self._announce = announce
        self._stages: dict[str, tuple[str, _Speed]] = {}  # unit and speed
        self._whole = _Whole()
        self._shown = 0.0

    def listen(self, event: dict[str, Any]) -> None:
        """Take an event."""
        kind = event["event"]
        self._whole.listen(event)
        if kind == "stage":
            again = "shard" in event and event["stage"] in self._stages
            self._stages[event["stage"]] = event["unit"], _Speed()
            self._shown = time.monotonic()
            if self._announce and not again:
                _print(f"{event['stage']} ({event['total']} {event['unit']})")
        elif kind == "step":
            unit, speed = self._stages[event["stage"]]
            speed.update(event["done"])
            due = speed.now - self._shown >= LOG_SECONDS
            texts = speed.texts(event["total"], unit) if due else []
            if texts:
                self._shown = speed.now
                facts = [f"loss {event['loss']:.4f}"] if "loss" in event else []
                count = f"{event['stage']}: {event['done']:,} of {event['total']:,}"
                whole = self._whole.text(event["done"] / max(1, event["total"]))
                _print(", ".join([count, *facts, *texts, *filter(None, [whole])]))
        else:
            for line in _lines(event):
                _print(line)


def _lines(event: dict[str, Any]) -> list[str]:
    """The lines of a note, a plan or an estimate."""
    if event["event"] == "note":
        return [printable(line) for line in event["text"].splitlines()]
    if event["event"] == "estimate":
        return [costs(event["seconds"])]
    return [printable(line) for line in event["lines"]] if event["event"] == "plan" else []


def costs(seconds: Mapping[str, float]) -> str:
    """Return what a run is expected to take on this machine, in all and by its parts."""
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return f"about {duration(sum(seconds.values()))} on this machine ({parts})"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def live_view() -> Iterator[Listener]:
    """Yield a listener that shows a run on stderr: in place on a terminal, as lines in a log."""
    if not sys.stderr.isatty():
        yield _Log().listen
        return
    view = View()
    with _drawn(view):
        yield view.listen


@contextmanager
def progress_bar(title: str, *, unit: str = "images", quiet: bool = False) -> Iterator[Counter]:
    """Yield a function of (done, total) that shows speed and time left on stderr.

    Args:
        title: what is done, as `decoding`.
        unit: what is counted.
        quiet: show nothing.
    """
    if quiet:
        yield lambda done, total: None
        return
    show: View | _Log = View() if sys.stderr.isatty() else _Log(announce=False)
    show.listen({"event": "stage", "stage": title, "total": 0, "unit": unit})

    def update(done: int, total: int) -> None:
        show.listen({"event": "step", "stage": title, "done": done, "total": total})

    if isinstance(show, View):
        with _drawn(show):
            yield update
    else:
        yield update


@contextmanager
def _drawn(view: View) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    with Live(view, console=Console(stderr=True), refresh_per_second=4):
        yield


class StatusLine:
    """One line on stderr about work that comes in pieces, between which the caller does other work.

    The speed counts the time of the pieces alone. Nothing shows before two seconds of work.
    """

    def __init__(
        self, title: str, total: int, *, unit: str = "images", quiet: bool = False
    ) -> None:
        self._title, self._total, self._unit, self._quiet = title, total, unit, quiet
        self._seconds = 0.0
        self._worked = 0
        self._shown = 0.0

    def add(self, number: int, seconds: float, done: int | None, total: int | None = None) -> None:
        """Count `number` units made in `seconds`; `done` of all are ready (None: none is kept)."""
        self._total = self._total if total is None else total
        self._seconds += seconds
        self._worked += number
        complete = done is not None and done >= self._total
        if self._quiet or self._seconds < 2.0 or not (complete or self._is_time()):
            return
        speed = self._worked / self._seconds
        if done is None:
            text = f"{self._title} {self._worked:,} {self._unit}, {speed:.1f} {self._unit}/s"
        else:
            count = f"{done:,} of {self._total:,} {self._unit}"
            text = f"{self._title} {count}, {speed:.1f} {self._unit}/s"
            text += "" if complete else f", {clock((self._total - done) / speed)} left"
        self._print(text, ends=complete)

    def part(self, done: int, number: int, seconds: float) -> None:
        """Show that `done` units of a piece of `number` are made, where it takes long."""
        if self._quiet or seconds < _LONG_PIECE or not 0 < done < number or not self._is_time():
            return
        left = clock((number - done) * seconds / done)
        self._print(
            f"{self._title} {done:,} of the next {number:,} {self._unit}, {left} left",
            ends=False,
        )

    def _is_time(self) -> bool:
        """Return whether the line may be shown again; if so, take note of it."""
        now = time.monotonic()
        if now - self._shown < (0.5 if sys.stderr.isatty() else LOG_SECONDS):
            return False
        self._shown = now
        return True

    def _print(self, text: str, *, ends: bool) -> None:
        start, end = ("\r\x1b[K", "\n" * ends) if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
