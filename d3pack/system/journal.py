"""The work directory: what is done is on disk, whole, or it was not done.

Every file is written beside its name, flushed, and renamed; so a process killed at any moment
leaves only finished files. A stage is a pure function of the source, the settings and earlier
stages, so going on after a kill gives the bytes that an uninterrupted run gives.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from d3pack.errors import D3MError, NoSpaceError, UsageError

if sys.platform != "win32":
    import fcntl

Arrays = dict[str, npt.NDArray[Any]]
_VERSION = 3
_OWN = {"journal.json", "lock", "log.txt"}


class JournalError(D3MError):
    """The work directory cannot be used as it is."""

    code = "E_JOURNAL"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    trial = path.with_name(path.name + ".part")
    try:
        with open(trial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(trial, path)
    except OSError as error:
        trial.unlink(missing_ok=True)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpaceError(
                f"no space left to write {path.name}",
                hint="free some and run the same command: it goes on where it stopped",
            ) from error
        raise JournalError(f"cannot write {path.name}: {error.strerror}") from error


def _refuse_others(folder: Path) -> None:
    """Files without a journal beside them are somebody's: a new work would delete them."""
    found = {entry.name for entry in folder.iterdir()}
    if "journal.json" not in found and found - _OWN - {"journal.json.part"}:
        raise JournalError(
            f"{folder.name} holds files of another origin",
            hint="move them away, or name another output",
        )


class Journal:
    """Facts and arrays of one run, by name. One process at a time."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        self.key = json.loads(json.dumps(dict(key)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_others(folder)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise JournalError(
                f"cannot work in {folder.name}: {error.strerror}", hint="name another output"
            ) from error
        try:
            if sys.platform != "win32":
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise JournalError(
                f"another process works in {folder.name}",
                hint="wait for it, or name another output",
            ) from error
        try:
            self.facts = self._open(restart)
        except BaseException:
            self.close()
            raise

    def _open(self, restart: bool) -> dict[str, Any]:
        for left in self.folder.glob("**/*.part"):
            left.unlink()
        path = self.folder / "journal.json"
        if path.exists() and not restart:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                key, facts = found["key"], found["facts"]
                version = found["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{self.folder.name} holds no readable journal", hint="pass --restart"
                ) from error
            if version != _VERSION:
                raise JournalError(
                    f"{self.folder.name} was written by another version", hint="pass --restart"
                )
            self.facts = dict(facts)
            if self.begun:
                self._compare(key)
                return self.facts
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _OWN:  # the journal last: without it the folder is not ours
                entry.unlink()
        self.facts = {}
        self._save()
        return self.facts

    def _compare(self, key: Mapping[str, Any]) -> None:
        for name in sorted({*key, *self.key}):
            was, now = key.get(name), self.key.get(name)
            if was == now:
                continue
            if name == "source":
                raise UsageError(
                    "the source has changed since this work began",
                    hint="put it back to go on, or pass --restart to begin anew",
                )
            before, after = (
                "not given" if value is None else json.dumps(value) for value in (was, now)
            )
            raise UsageError(
                f"{name} was {before} when this work began and is {after} now",
                hint="run the same command to go on, or pass --restart to begin anew",
            )

    def _save(self) -> None:
        value = {"version": _VERSION, "key": self.key, "facts": self.facts}
        text = json.dumps(value, indent=1, sort_keys=True)
        write_whole(self.folder / "journal.json", text.encode())

    def record(self, name: str, value: Any) -> None:
        """Remember a plain value; it comes back as JSON gives it."""
        self.facts[name] = json.loads(json.dumps(value))
        self._save()

    def __contains__(self, name: str) -> bool:
        return name in self.facts

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    @property
    def begun(self) -> bool:
        """Whether anything is done that a run would go on from."""
        return bool(self.facts) or any(self.folder.glob("**/*.safetensors"))

    def path(self, name: str) -> Path:
        """Where a file of this work lies; its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Keep arrays and plain facts as one safetensors file."""
        whole = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        meta = {"facts": json.dumps(dict(facts), sort_keys=True)}
        write_whole(self.path(f"{name}.safetensors"), save_tensors(whole, metadata=meta))

    def load(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """The arrays and facts of `save`, or None when they were never finished."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        data = path.read_bytes()
        try:
            arrays = {key: np.array(value) for key, value in load_tensors(data).items()}
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return arrays, json.loads(header["__metadata__"]["facts"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise JournalError(
                f"{path.name} in {self.folder.name} is damaged", hint="pass --restart"
            ) from error

    def drop(self, folder: str) -> None:
        """Forget a folder of arrays that nothing needs any more."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process in."""
        os.close(self._lock)
