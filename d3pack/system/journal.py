"""The work directory of a long run: what is finished is on disk, completely.

A stage of a run is a pure function of the source, the settings and earlier stages, so a run that
goes on after a kill ends with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from d3pack.errors import D3MError, UsageError
from d3pack.system.files import PREFIX, SUFFIX, remove_leftovers, writing
from d3pack.system.locks import Lock, lock
from d3pack.system.mirror import Mirror, WorkFolder, look, work_folder
from d3pack.system.objects import ObjectPath

Arrays = dict[str, npt.NDArray[Any]]
CHECKPOINT_SECONDS = 5.0  # a killed run repeats at most this and one stretch of steps
_SAVING = 0.1  # most of the time that saving checkpoints may take, in a store that is far away
_VERSION = 3
_FACTS = "journal.json"
_OWN = {_FACTS, "lock", "log.txt"}
_LOOK_SECONDS = 1.0  # between two looks at other parts
_STORE_SECONDS = 10.0  # the same where each is a request that costs money


class JournalError(D3MError):
    """The work directory cannot be used as it is."""

    code = "E_JOURNAL"


class Journal:
    """Facts and arrays of one run, by name. One process at a time.

    Args:
        folder: the work directory, created where it is missing. What is in an object store is kept
            there, and read and written in a temporary folder of this machine.
        key: what must be the same for a run to go on: the source, the settings.
        restart: discard what an earlier run left.
        start_over: what to do to begin anew, for the hints of errors.
        parts: work directories of other shards of the run: what they have finished is found in this
            journal too, while they are at work.

    Attributes:
        folder: where this machine has the files of the work directory.
    """

    def __init__(
        self,
        folder: Path | ObjectPath,
        key: Mapping[str, Any],
        *,
        restart: bool = False,
        start_over: str = "",
        parts: Sequence[Path | ObjectPath] = (),
    ) -> None:
        self.key = json.loads(json.dumps(dict(key)))
        self._start_over = start_over or f"delete {folder.name}"
        self._known: dict[Path, tuple[int, dict[str, Any]]] = {}  # time of change, facts of parts
        self._work, self._lock = work_folder(folder), None
        self._handed: set[str] = set()  # what others write to, by its name at the top
        self._parts = tuple(map(work_folder, parts))
        self.folder = self._work.local
        try:
            self._lock = self._begin()
            if self._lock.held:
                remove_leftovers(self.folder)
            self.facts = self._open(restart)
        except BaseException:
            self.close()
            raise

    def _begin(self) -> Lock:
        name = self.folder.name
        try:
            _refuse_others(self._work, name)
            self._work.begin()
            return lock(self.folder / "lock")
        except BlockingIOError:
            raise JournalError(
                f"another process works in {name}",
                hint="wait for it, or name another output",
            ) from None
        except OSError as error:
            raise JournalError(
                f"cannot work in {name}: {error.strerror}", hint="name another output"
            ) from error

    def _open(self, restart: bool) -> dict[str, Any]:
        path = self.folder / _FACTS
        if path.exists() and not restart:
            key, self.facts = _read(path, f"{self._start_over} to begin anew")
            if self.begun:
                self._compare(key)
                return self.facts
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _OWN:  # the journal stays: without it the folder is not ours
                entry.unlink()
            self._send([entry.name])
        self.facts = {}
        self._save()
        return self.facts

    def _compare(self, key: Mapping[str, Any]) -> None:
        for name in self._differing(key):
            was, now = key.get(name), self.key.get(name)
            if name == "source":
                raise UsageError(
                    "the source has changed since this work began",
                    hint=f"put it back to go on, or {self._start_over} to begin anew",
                )
            before, after = (
                "not given" if value is None else json.dumps(value) for value in (was, now)
            )
            raise UsageError(
                f"{name} was {before} when this work began and is {after} now",
                hint=f"run the same command to go on, or {self._start_over} to begin anew",
            )

    def _save(self) -> None:
        value = {"version": _VERSION, "key": self.key, "facts": self.facts}
        text = json.dumps(value, indent=1, sort_keys=True)
        self._write(_FACTS, text.encode())

    def _write(self, name: str, data: bytes) -> None:
        self.send()  # first what this may speak of
        path = self._place(name)
        try:
            with writing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise JournalError(f"cannot write {path.name}: {error.strerror}") from error
        self._send([name])

    def send(self) -> None:
        """Keep what was written to `path`, where the work directory is that of a store.

        Raises:
            JournalError: another process has taken the work over.
        """
        self._send(self._handed)

    def _send(self, names: Iterable[str]) -> None:
        try:
            self._work.send(names)
        except BlockingIOError:
            raise JournalError(
                f"another process has taken {self.folder.name} over", hint="leave the work to it"
            ) from None

    def record(self, name: str, value: Any) -> None:
        """Remember a plain value; it comes back as JSON gives it."""
        self.facts[name] = json.loads(json.dumps(value))
        self._save()

    def __contains__(self, name: str) -> bool:
        return any(name in facts for facts in self._all_facts())

    def __getitem__(self, name: str) -> Any:
        for value in self.everywhere(name):
            return value
        raise KeyError(name)

    def everywhere(self, name: str) -> Iterator[Any]:
        """Yield the fact of this run, then those of its other parts, where there are any."""
        yield from (facts[name] for facts in self._all_facts() if name in facts)

    def _all_facts(self) -> Iterator[Mapping[str, Any]]:
        yield self.facts
        for part in self._parts:
            path = part.local / _FACTS
            if not path.exists():  # not begun
                continue
            changed = path.stat().st_mtime_ns
            known, facts = self._known.get(path, (0, {}))
            if known != changed:
                key, facts = _read(path, f"{self._start_over} to begin anew")
                self._compare_part(part.local.name, key)
                self._known[path] = changed, facts
            yield facts

    @property
    def look_seconds(self) -> float:
        """How long to wait between two looks at other parts."""
        return _STORE_SECONDS if self._mirrors else _LOOK_SECONDS

    @property
    def _mirrors(self) -> list[Mirror]:
        return [part for part in self._parts if isinstance(part, Mirror)]

    def look(self) -> None:
        """See what other parts have finished, and refuse those begun with other settings.

        Raises:
            UsageError: if there is one.
        """
        if mirrors := self._mirrors:
            look(mirrors, _FACTS)
        for _ in self._all_facts():
            pass

    def _compare_part(self, part: str, key: Mapping[str, Any]) -> None:
        for name in self._differing(key):
            what = "source" if name == "source" else f"setting {name}"
            raise UsageError(
                f"the part {part} was made with another {what}",
                hint="give all shards the same command",
            )

    def _differing(self, key: Mapping[str, Any]) -> list[str]:
        return sorted(n for n in {*key, *self.key} if key.get(n) != self.key.get(n))

    def find(self, name: str) -> Path | None:
        """Return where a file or folder of this work lies, in this or another part of the run."""
        folders = (self._work, *self._parts)
        return next((path for folder in folders if (path := folder.find(name))), None)

    def has(self, name: str) -> bool:
        """Return whether there are arrays or a fact of that name."""
        file = f"{name}.safetensors"
        return any(folder.has(file) for folder in (self._work, *self._parts)) or name in self

    @property
    def begun(self) -> bool:
        """Whether anything is done that a run would go on from."""
        return bool(self.facts) or any(self.folder.glob("**/*.safetensors"))

    def path(self, name: str) -> Path:
        """Return where a file of this work lies; its folder exists."""
        self._handed.add(name.partition("/")[0])
        return self._place(name)

    def _place(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Keep arrays and plain facts as one safetensors file."""
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        meta = {"facts": json.dumps(dict(facts), sort_keys=True)}
        self._write(f"{name}.safetensors", save_tensors(contiguous, metadata=meta))

    def load(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """Return the arrays and facts of `save`, or None when they were never finished."""
        path = self.find(f"{name}.safetensors")
        if path is None:
            return None
        data = path.read_bytes()
        try:
            arrays = {key: np.array(value) for key, value in load_tensors(data).items()}
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return arrays, json.loads(header["__metadata__"]["facts"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise JournalError(
                f"{path.name} in {path.parents[name.count('/')].name} is damaged",
                hint=f"{self._start_over} to begin anew",
            ) from error

    def drop(self, folder: str) -> None:
        """Delete a folder of arrays that nothing needs any more."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        self._send([folder])

    def close(self) -> None:
        """Release the lock: another process may go on with the work."""
        if self._lock is not None:
            self._lock.close()
        for folder in (self._work, *self._parts):
            folder.close()


class Checkpoint:
    """The state of an optimisation in a journal, written every few seconds at most."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        self._saved, self._every = time.monotonic(), CHECKPOINT_SECONDS

    def load(self) -> Arrays | None:
        """Return the state that was saved last, or None."""
        if not (self._journal.folder / f"{self._name}.safetensors").exists():
            return None  # that of another part is none of this one
        stored = self._journal.load(self._name)
        return None if stored is None else stored[0]

    def save(self, state: Arrays, *, last: bool = False) -> None:
        """Save the state, unless that was done a moment ago; the last one always."""
        began = time.monotonic()
        if last or began - self._saved >= self._every:
            self._journal.save(self._name, state, {})
            self._saved = time.monotonic()
            self._every = max(CHECKPOINT_SECONDS, (self._saved - began) / _SAVING)


def read_facts(folder: Path | ObjectPath) -> dict[str, Any]:
    """Return the facts of a work directory; another process may be at work in it.

    Raises:
        JournalError: if it is none.
    """
    path = folder / _FACTS
    if not path.exists():
        raise JournalError(f"{folder.name} is not a work directory")
    return _read(path, "make it again")[1]


def _read(path: Path | ObjectPath, hint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return key and facts of a journal."""
    name = path.parent.name
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, key, facts = record["version"], dict(record["key"]), dict(record["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{name} holds no readable journal", hint=hint) from error
    if version != _VERSION:
        raise JournalError(f"{name} was written by another version", hint=hint)
    return key, facts


def _refuse_others(work: WorkFolder, name: str) -> None:
    """Refuse a folder of files without a journal: they are not ours, and would be deleted."""
    names = {one for one in work.names() if not (one.startswith(PREFIX) and one.endswith(SUFFIX))}
    if _FACTS not in names and names - _OWN:
        raise JournalError(
            f"{name} holds files of another origin",
            hint="move them away, or name another output",
        )
