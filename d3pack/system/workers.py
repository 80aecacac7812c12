"""Shards on several devices and machines, by workers that Ray starts, each on a device.

Ray only places and watches the workers. What is done lies in the folders of the shards, so a shard
whose worker or machine is lost goes on with another worker, and a run goes on after its end.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from d3pack.errors import D3MError, StorageError, UsageError
from d3pack.system.extras import require
from d3pack.system.progress import Listener
from d3pack.system.settings import SettingError, check, option
from d3pack.system.shard import MOST_SHARDS, BusyError, Shard, WaitingError

EACH = 4  # shards for each worker, where nobody chooses
_LOSSES = 5  # of one shard, before the run gives up
_LOOK_SECONDS = 0.5  # between two looks at the events of workers
_SEEN_SECONDS = 10.0  # in which a file of another machine appears
_MOST_WAIT = 30.0  # seconds until a shard that waits for others is tried again
_TURNS = 5  # in which no shard comes further, before the run gives up
_LAST_SECONDS = 5.0  # for the last events
_EVENTS = "events"  # the thread of a worker that answers while it works
_LEFT = "left"  # the event by which a worker leaves a shard


@dataclass(frozen=True, slots=True)
class Workers:
    """Where the shards of a run are done; by default there are none.

    Example:
        >>> Workers(devices="all").wanted
        True
    """

    ray: str | None = option(
        None,
        "Work on a Ray cluster that is there: auto finds it, as in `ray job submit`.",
        metavar="[auto|ADDRESS]",
        private=True,
    )
    devices: str | None = option(
        None,
        "Work on so many devices, or all, each with a worker; without --ray, of this machine.",
        metavar="[all|N]",
        private=True,
    )
    shards: int | None = option(
        None,
        f"Shares that workers take one after another; by default {EACH} for each worker.",
        ge=1,
        le=MOST_SHARDS,
        private=True,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.devices is not None and not (self.devices == "all" or self.number):
            raise SettingError("devices", self.devices, "all or their number")
        if self.shards is not None and not self.wanted:
            raise UsageError("shards= are for workers", hint="set ray= or devices=")

    @property
    def wanted(self) -> bool:
        """Whether there are to be any."""
        return self.ray is not None or self.devices is not None

    @property
    def number(self) -> int:
        """How many workers were asked for; 0: as many as there are devices."""
        return int(self.devices) if self.devices and self.devices.isdecimal() else 0


class Work(Protocol):
    """A run in shards. It is sent to each worker, which opens it once."""

    @property
    def folder(self) -> Path | None:
        """What all workers have to see; None where they share an object store."""
        ...

    def open(self, listen: Listener) -> None:
        """Open what all shards need, such as the backbone, and report to `listen` from now on."""
        ...

    def do(self, shard: Shard) -> None:
        """Do a share, or what is missing of it.

        Raises:
            WaitingError: results of other shards are needed first.
        """
        ...

    def finish(self, count: int) -> Any:
        """Return the result, when all of `count` shards are done."""
        ...


def run_work(
    work: Work,
    workers: Workers,
    listeners: Sequence[Listener] = (),
    *,
    device: str | None = None,
    shards: int | None = None,
    most: int = MOST_SHARDS,
) -> Any:
    """Do all shards of a run by workers, then return what `work.finish` returns.

    Args:
        work: what they do.
        workers: where, and how many.
        listeners: receive the events of all workers, put together.
        device: what a worker works on; None: a GPU where there is one, else one core.
        shards: how many the run was begun with, where that matters.
        most: shards of which each has something to do.

    Raises:
        D3MError: a shard has lost its worker, or its storage, too often.
        UsageError: there is no such cluster or device, or a worker does not see the folder.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports nothing to its makers
    ray = require("ray", "work on several devices")
    with _cluster(ray, workers), _token(work.folder) as token:
        resource, number = _devices(ray, workers, device)
        count = workers.shards or shards or max(1, min(EACH * number, most))
        gpus, groups = int(resource == "GPU"), {_EVENTS: 1}
        kind = ray.remote(num_cpus=1, num_gpus=gpus, concurrency_groups=groups)(_Worker)
        arguments = (ray.put(work), os.getcwd(), token)
        joined = Joined(listeners)
        joined.note(f"{count} shards for {number} workers on a {resource} each")
        return _Run(ray, kind, arguments, number, count, joined).result()


@contextmanager
def _cluster(ray: Any, workers: Workers) -> Iterator[None]:
    """Connect to a cluster, or start one here that ends with the run."""
    if ray.is_initialized():  # by the program that calls
        yield
        return
    how: dict[str, Any] = {"address": workers.ray}
    if workers.ray is None:
        cores = max(os.cpu_count() or 1, workers.number)
        how = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", **how)
    except (ConnectionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"there is no Ray cluster at {workers.ray}: {reason}",
            hint="`ray start --head` begins one; devices= needs none",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _devices(ray: Any, workers: Workers, device: str | None) -> tuple[str, int]:
    """Return "GPU" or "CPU", and how many workers there are to be."""
    there = ray.cluster_resources()
    on_gpu = not device.startswith("cpu") if device else there.get("GPU", 0) >= 1
    resource = "GPU" if on_gpu else "CPU"
    has = int(there.get(resource, 0))
    number = workers.number or has
    if not number or (workers.ray is None and on_gpu and number > has):
        raise UsageError(f"there are {has} GPUs, not {number or 1}", hint="use the device cpu")
    return resource, number


@contextmanager
def _token(folder: Path | None) -> Iterator[Path | None]:
    """Write a file by which a worker tells that it sees the folder of this run."""
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    token = folder.absolute() / f".d3pack-{uuid.uuid4().hex}"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


class _Worker:
    """The actor: it keeps the opened work, and does one shard at a time."""

    def __init__(self) -> None:
        self._work: Work
        self._shard, self._gained = "", False  # while it opens
        self._events: list[dict[str, Any]] = []
        self._lock = Lock()  # `events` is called from a thread of its own

    def open(self, work: Work, home: str, token: Path | None) -> None:
        """Open the work in the directory in which the run was started."""
        with suppress(OSError):  # with an object store, nobody needs it
            os.chdir(home)
        end = time.monotonic() + _SEEN_SECONDS
        while token is not None and not token.exists():
            if time.monotonic() > end:
                raise UsageError(
                    f"a worker on {platform.node()} does not see {token.parent}",
                    hint="all machines have to share the storage of the output",
                )
            time.sleep(0.1)
        self._work = work
        work.open(self._listen)

    def do(self, shard: Shard) -> tuple[bool, bool]:
        """Do a shard; return whether it is done, or has to wait, and whether it came further."""
        self._shard, self._gained = str(shard), False
        try:
            self._work.do(shard)
        except WaitingError:
            return False, self._gained
        finally:
            self._listen({"event": _LEFT})
        return True, True

    def finish(self, count: int) -> Any:
        """Return the result of the run."""
        self._shard = "end"
        return self._work.finish(count)

    def events(self) -> list[dict[str, Any]]:
        """Return what has happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def _listen(self, event: dict[str, Any]) -> None:
        event = {**event, "shard": self._shard}
        if not self._shard and event["event"] not in {"note", "plan"}:
            return  # each worker does the same
        self._gained |= event["event"] == "step"
        with self._lock:
            if self._events and _replaces(event, self._events[-1]):
                self._events.pop()
            self._events.append(event)


def _replaces(event: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether an event counts on from the last one, which nobody needs then."""
    same = ("event", "stage", "shard")
    return event["event"] == "step" and all(event.get(n) == last.get(n) for n in same)


class Joined:
    """Puts together what shards report: the counts of a stage are added up.

    A stage that all shards count together (its event has `done`) has one total; of others, each
    shard has its own part.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._stages: dict[str, _Stage] = {}
        self._said: set[str] = set()

    def listen(self, event: dict[str, Any]) -> None:
        """Take an event of a shard."""
        kind, shard = event["event"], event["shard"]
        if kind == "stage":
            stage = self._stages.setdefault(event["stage"], _Stage(event))
            stage.begin(event)
            self._show(stage, again=False)
        elif kind == "step":
            stage = self._stages[event["stage"]]
            done, total = stage.count(event)
            self._show(stage)
            others = {name: value for name, value in event.items() if name != "samples"}
            self._emit({**others, "done": done, "total": total})
        elif kind == "stage-done":
            self._leave(self._stages[event["stage"]], shard)
        elif kind == _LEFT:
            self.left(shard)
        elif kind not in {"note", "plan"}:
            self._emit(event)
        elif (text := event.get("text") or str(event["lines"])) not in self._said:
            self._said.add(text)  # each worker says the same of what all have done
            self._emit(event)

    def note(self, text: str) -> None:
        """Report one line of the run itself."""
        self._emit({"event": "note", "text": text})

    def left(self, shard: str) -> None:
        """A shard has stopped: it is done, waits, or has lost its worker."""
        for stage in self._stages.values():
            self._leave(stage, shard)

    def _show(self, stage: _Stage, *, again: bool = True) -> None:
        if stage.shown is None or (again and not stage.shown):
            stage.shown = True
            self._emit(stage.event)

    def _leave(self, stage: _Stage, shard: str) -> None:
        stage.active.discard(shard)
        if stage.shown and not stage.active:
            stage.shown = False
            name, seconds = stage.event["stage"], round(time.monotonic() - stage.began, 2)
            self._emit({"event": "stage-done", "stage": name, "seconds": seconds})

    def _emit(self, event: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(event)


class _Stage:
    """A stage and its counts."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.event = event
        self.active: set[str] = set()
        self.shown: bool | None = None  # None: not yet
        self.began = time.monotonic()
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._all: int | None = None

    def begin(self, event: dict[str, Any]) -> None:
        """A shard begins it, or begins it again."""
        shard, done = event["shard"], event.get("done")
        self.active.add(shard)
        self._total[shard], self._done[shard] = event["total"], done or 0
        if done is not None:
            self._all = max(self._all or 0, done)

    def count(self, event: dict[str, Any]) -> tuple[int, int]:
        """Return how much of how much is done, by all shards."""
        shard, done = event["shard"], event["done"]
        gained, self._done[shard] = done - self._done[shard], done
        if self._all is None:
            return sum(self._done.values()), sum(self._total.values())
        self._all = min(self._all + gained, event["total"])
        return self._all, event["total"]


@dataclass(slots=True)
class _Task:
    """A shard that is left; None: to put the results together."""

    shard: Shard | None
    after: float = 0.0  # when it is tried again
    waited: int = 0  # times in a row
    losses: int = 0


@dataclass(slots=True, eq=False)
class _Actor:
    """A worker as the driver sees it."""

    handle: Any
    opening: bool = True
    task: _Task | None = None


class _Run:
    """Hands out shards to workers that are free, none of them in advance."""

    def __init__(
        self,
        ray: Any,
        kind: Any,
        arguments: tuple[Any, ...],  # to open a worker with
        number: int,
        count: int,
        joined: Joined,
    ) -> None:
        self._ray, self._kind, self._arguments = ray, kind, arguments
        self._count, self._joined = count, joined
        self._left = [_Task(Shard(n, count)) for n in range(1, count + 1)]
        self._actors: list[_Actor] = []
        self._calls: dict[Any, _Actor] = {}  # that are not answered
        self._asked: dict[Any, _Actor] = {}  # the same of calls for events
        self._losses = 0  # of workers that were opening
        self._value: Any = None
        for _ in range(number):
            self._start()

    def result(self) -> Any:
        """Do all shards, then put their results together."""
        try:
            self._work_off()
            self._left = [_Task(None)]
            self._work_off()
            for seconds in (0.0, _LAST_SECONDS):
                self._report(seconds)
        finally:
            for actor in self._actors:
                self._ray.kill(actor.handle)
        return self._value

    def _work_off(self) -> None:
        """Hand out what is left until it is done."""
        reported = 0.0
        while self._left or any(actor.task for actor in self._actors):
            self._hand_out(time.monotonic())
            answered, _ = self._ray.wait(list(self._calls), timeout=_LOOK_SECONDS)
            for call in answered:
                self._take(call, self._calls.pop(call))
            if time.monotonic() - reported > _LOOK_SECONDS:
                self._report(0.0)
                reported = time.monotonic()

    def _start(self) -> None:
        actor = _Actor(self._kind.remote())
        self._actors.append(actor)
        self._open(actor)

    def _open(self, actor: _Actor) -> None:
        self._calls[actor.handle.open.remote(*self._arguments)] = actor

    def _hand_out(self, now: float) -> None:
        for actor in self._actors:
            task = next((task for task in self._left if task.after <= now), None)
            if task is None or actor.opening or actor.task is not None:
                continue
            self._left.remove(task)
            actor.task = task
            handle, shard = actor.handle, task.shard
            call = handle.do.remote(shard) if shard else handle.finish.remote(self._count)
            self._calls[call] = actor
        if not self._calls:  # everybody waits
            if all(task.waited > _TURNS for task in self._left):
                raise WaitingError(
                    "the shards wait for results that none of them has",
                    hint="is another process at work? the same call goes on",
                )
            time.sleep(max(0.0, min(task.after for task in self._left) - now))

    def _take(self, call: Any, actor: _Actor) -> None:
        """Take an answer."""
        try:
            value = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            self._failed(actor, error.cause)
        except self._ray.exceptions.RayError as error:  # the worker or its machine is gone
            self._lost(actor, error)
        else:
            task, actor.task = actor.task, None
            if task is None:
                actor.opening = False
            elif task.shard is None:
                self._value = value
            else:
                self._did(task, *value)

    def _did(self, task: _Task, done: bool, gained: bool) -> None:
        """Where a shard waits, try it again when another one comes further, or after a while."""
        if gained:
            self._wake()
        if not done:
            task.waited = 0 if gained else task.waited + 1
            wait = 0.0 if gained else min(_MOST_WAIT, _LOOK_SECONDS * 2**task.waited)
            self._again(task, wait)

    def _wake(self) -> None:
        """Try shards that wait again now."""
        for task in self._left:
            task.after = 0.0 if task.waited else task.after

    def _failed(self, actor: _Actor, error: Exception) -> None:
        """Where storage fails or a lost worker still holds a lock, the shard is tried again."""
        from d3pack.system.journal import JournalError  # numpy stays out of the help

        storage = isinstance(error, OSError | JournalError | StorageError | BusyError)
        task, actor.task = actor.task, None
        losses = self._losses if task is None else task.losses
        if not (storage or type(error) is D3MError) or losses == _LOSSES:
            raise error
        if task is None:
            self._losses += 1
            self._open(actor)
        else:
            task.losses, task.waited = losses + 1, 0
            self._joined.note(f"{_name(task)} is tried again: {error}")
            self._again(task, _LOOK_SECONDS * 2**losses)

    def _lost(self, actor: _Actor, error: Exception) -> None:
        """Replace a worker; its shard goes on from what it has finished."""
        task = actor.task
        losses = self._losses if task is None else task.losses
        if losses == _LOSSES:
            reason = str(error).strip().splitlines()[-1]
            raise D3MError(
                f"{_name(task)} has lost its worker {losses + 1} times: {reason}",
                hint="is there too little memory? the same call goes on",
            )
        self._joined.note(f"{_name(task)} has lost its worker, and is given to another")
        self._actors.remove(actor)
        self._start()
        if task is None:
            self._losses += 1
        else:
            task.losses, task.waited = losses + 1, 0
            self._joined.left(str(task.shard or ""))
            self._again(task, 0.0)

    def _again(self, task: _Task, seconds: float) -> None:
        task.after = time.monotonic() + seconds
        self._left.append(task)

    def _report(self, seconds: float) -> None:
        """Report what the workers have told, and ask those that owe no answer for more."""
        for actor in self._actors:
            if not actor.opening and actor not in self._asked.values():
                ask = actor.handle.events.options(concurrency_group=_EVENTS)
                self._asked[ask.remote()] = actor
        calls = list(self._asked)
        waiting = {str(task.shard) for task in self._left if task.waited}
        answered, _ = self._ray.wait(calls, num_returns=max(1, len(calls)), timeout=seconds)
        for call in answered:
            del self._asked[call]
            with suppress(self._ray.exceptions.RayError):  # a lost worker is met elsewhere
                for event in self._ray.get(call):
                    self._joined.listen(event)
                    # a worker has ended a stage: perhaps the one that others wait for
                    if event["event"] == "stage-done" and event["shard"] not in waiting:
                        self._wake()


def _name(task: _Task | None) -> str:
    if task is None:
        return "a worker that begins"
    return f"shard {task.shard}" if task.shard else "the end of the run"
