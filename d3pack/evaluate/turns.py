"""Processes in one work directory: what several need is made by one, and found by the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from d3pack.system import BusyError, Events, Shard, SharedFolder


@contextmanager
def turn(work: SharedFolder, place: Path, what: str, events: Events) -> Iterator[None]:
    """Wait until no other process makes the file at `place`, and keep others waiting.

    One who waited looks first whether it is there now.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_suffix(".lock")
    with ExitStack() as held:
        try:
            held.enter_context(work.alone(path))
        except BlockingIOError:
            events.note(f"{what}: waiting for another process")
            held.enter_context(work.alone(path, wait=True))
        yield


@contextmanager
def only_process(work: SharedFolder, shard: Shard) -> Iterator[None]:
    """Keep other processes from the same share of an evaluation.

    Raises:
        BusyError: if another one is at it.
    """
    path = work.local / f"shard-{shard.number}-of-{shard.count}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(work.alone(path))
        except BlockingIOError:
            raise BusyError(
                f"another process trains shard {shard} in {work.where}",
                hint="wait for it, or choose another shard",
            ) from None
        yield
