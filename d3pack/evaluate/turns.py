"""Processes in one work directory: what several need is made by one, and found by the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from d3pack.system import BusyError, Events, Shard, exclusive


@contextmanager
def turn(place: Path, what: str, events: Events) -> Iterator[None]:
    """Wait until no other process makes the file at `place`, and keep others waiting.

    One who waited looks first whether it is there now.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_suffix(".lock")
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(path))
        except BlockingIOError:
            events.note(f"{what}: waiting for another process")
            held.enter_context(exclusive(path, wait=True))
        yield


@contextmanager
def only_process(work: Path, shard: Shard) -> Iterator[None]:
    """Keep other processes from the same share of an evaluation.

    Raises:
        BusyError: if another one is at it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(work / f"shard-{shard.number}-of-{shard.count}.lock"))
        except BlockingIOError:
            raise BusyError(
                f"another process trains shard {shard} in {work}",
                hint="wait for it, or choose another shard",
            ) from None
        yield
