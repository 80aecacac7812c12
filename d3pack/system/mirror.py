"""Work directories: a folder of this machine, or one in an object store that has a mirror here.

What works on files does so in both. A mirror is a temporary folder: what lies in the store is
fetched, and what was written is sent before anything that speaks of it. So the store holds what a
killed process would have left on a disk, and another machine goes on from there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Protocol

from d3pack.errors import D3MError, NotFoundError, StorageError
from d3pack.system.files import PREFIX, SUFFIX, writing
from d3pack.system.objects import ObjectInfo, ObjectPath

_LEASE = "lease"  # the object that tells who works in a folder of a store
_HERE = {"lock", _LEASE}  # never sent
_LOCK = ".lock"  # ends names that are not sent either
_CACHE = "cache"  # folders of that name are not sent: they are made again
_BEAT_SECONDS = 8.0  # between two signs of life
_DEAD_SECONDS = 30.0  # without one, after which a folder may be taken over
_CALLS = 8  # to a store at the same time


class WorkFolder(Protocol):
    """A work directory, wherever it is."""

    @property
    def local(self) -> Path:
        """Where its files are read and written."""
        ...

    def names(self) -> set[str]:
        """Return what is in it, at its top."""
        ...

    def begin(self) -> None:
        """Prepare to write to it.

        Raises:
            BlockingIOError: another process does so.
        """
        ...

    def has(self, name: str) -> bool:
        """Return whether it holds a file or folder of that name."""
        ...

    def find(self, name: str) -> Path | None:
        """Return where a file or folder can be read; None where there is none."""
        ...

    def send(self, names: Iterable[str]) -> None:
        """Keep files and folders that were written, if they are not where they belong yet.

        Raises:
            BlockingIOError: another process has taken the folder over.
        """
        ...

    def close(self) -> None:
        """Release the folder."""
        ...


def work_folder(where: Path | ObjectPath) -> WorkFolder:
    """Return the work directory at a place."""
    return Mirror(where) if isinstance(where, ObjectPath) else LocalFolder(where)


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A work directory on a disk, which all who need it see."""

    local: Path

    def names(self) -> set[str]:
        """Return what is in it, at its top."""
        return {entry.name for entry in self.local.iterdir()} if self.local.is_dir() else set()

    def begin(self) -> None:
        """Make the folder."""
        self.local.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Return whether it holds a file or folder of that name."""
        return (self.local / name).exists()

    def find(self, name: str) -> Path | None:
        """Return where a file or folder can be read; None where there is none."""
        return self.local / name if self.has(name) else None

    def send(self, names: Iterable[str]) -> None:
        """Do nothing: they are where they belong."""

    def close(self) -> None:
        """Do nothing: the lock of a journal is its own."""


class Mirror:
    """A work directory in an object store, and what of it is on this machine.

    To be written to, it is fetched whole (`begin`), and the store gets what changes (`send`). Those
    of other processes are only listed (`look`); their files are fetched when they are read.

    Args:
        store: the folder in the store.
        local: where its files are on this machine; by default in a temporary folder.
    """

    def __init__(self, store: ObjectPath, local: Path | None = None) -> None:
        self.store = store
        self.local = local or Path(tempfile.mkdtemp(prefix=PREFIX), store.name)
        self.local.parent.mkdir(mode=0o700, exist_ok=True)  # others may use the disk, too
        self.local.mkdir()
        self._lease: Lease | None = None
        self._there: dict[str, str] = {}  # tags of what is in the store
        self._folders: set[str] = set()
        self._fetched: dict[str, str] = {}  # tags of what is here
        # how sent files looked, by the names at the top under which they lie
        self._sent: dict[str, dict[str, tuple[int, ...]]] = {}

    def names(self) -> set[str]:
        """Return what is in the store, at its top."""
        self.listed(self.store.tree())
        return set(map(_top, self._there))

    def begin(self) -> None:
        """Take the folder, and fetch it.

        Raises:
            BlockingIOError: another process works in it.
        """
        self._lease = Lease(self.store / _LEASE)
        self.fetch()

    def fetch(self) -> None:
        """Fetch all that the store has and this machine has not."""
        self.listed(self.store.tree())
        with ThreadPoolExecutor(_CALLS) as pool:
            list(pool.map(self._fetch, self._there))

    def listed(self, rows: dict[str, ObjectInfo]) -> None:
        """Take over what the store has listed."""
        self._there = {name: info.tag for name, info in rows.items() if _is_work(name)}
        parents = {parent for name in self._there for parent in PurePosixPath(name).parents}
        self._folders = {str(parent) for parent in parents}

    def has(self, name: str) -> bool:
        """Return whether the store held a file or folder of that name when it was listed."""
        if self._lease is not None:  # all of it is here
            return (self.local / name).exists()
        return name in self._there or name in self._folders

    def find(self, name: str) -> Path | None:
        """Return where a file or folder can be read; None where there is none."""
        if self._lease is None and name in self._there:
            self._fetch(name)
        elif self._lease is None and name in self._folders:
            for inside in [one for one in self._there if one.startswith(f"{name}/")]:
                self._fetch(inside)
        path = self.local / name
        return path if path.exists() else None

    def changed(self, name: str) -> bool:
        """Return whether the store has another file of that name than this machine."""
        return name in self._there and self._fetched.get(name) != self._there[name]

    def _fetch(self, name: str) -> None:
        if not self.changed(name):
            return
        path = self.local / name
        if path.exists() and self._sent.get(_top(name), {}).get(name) != _looks(path):
            return  # written here since it was sent
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(NotFoundError), writing(path) as temporary:  # or removed since it was listed
            (self.store / name).download(temporary)
        if path.exists():
            self._fetched[name] = self._there[name]
            self._sent.setdefault(_top(name), {})[name] = _looks(path)

    def send(self, names: Iterable[str]) -> None:
        """Make files and folders in the store what they are here: first remove, then add."""
        if self._lease is not None:
            self._lease.check()
        for name in names:
            sent = self._sent.setdefault(_top(name), {})
            if not (self.local / name).is_file():
                self._remove(sent)
            for one, path in sorted(self._files(name)):
                looks = _looks(path)
                if sent.get(one) != looks:
                    (self.store / one).upload(path)
                    sent[one] = looks

    def send_all(self) -> None:
        """Make the store what the folder here is."""
        self.send({*self._sent, *(entry.name for entry in self.local.iterdir())})

    def _remove(self, sent: dict[str, tuple[int, ...]]) -> None:
        gone = [name for name in sent if not (self.local / name).exists()]
        with ThreadPoolExecutor(_CALLS) as pool:
            list(pool.map(lambda name: (self.store / name).unlink(), gone))
        for name in gone:
            del sent[name]

    def _files(self, below: str) -> Iterator[tuple[str, Path]]:
        """Yield the files under a name that belong into the store."""
        start = self.local / below
        for path in [start] if start.is_file() else start.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            if _is_work(name) and path.is_file():
                yield name, path

    def close(self) -> None:
        """Send the rest, give the folder free, and remove what is here."""
        try:
            if self._lease is not None:
                # sheets and the log; a fact has been sent, or was an error where it was recorded
                with suppress(StorageError, BlockingIOError):
                    self.send_all()
        finally:
            if self._lease is not None:
                self._lease.close()
            shutil.rmtree(self.local.parent, ignore_errors=True)


def look(mirrors: Sequence[Mirror], first: str) -> None:
    """See what is in the store now.

    Args:
        mirrors: of work directories that others write to.
        first: a file that speaks of others, which were sent before it. What it speaks of is found.
    """
    _list_all(mirrors)
    changed = [mirror for mirror in mirrors if mirror.changed(first)]
    for mirror in changed:
        mirror.find(first)
    if changed:  # it may speak of what was sent after the listing
        _list_all(mirrors)


def _list_all(mirrors: Sequence[Mirror]) -> None:
    """List work directories that lie side by side by one call."""
    for parent in {mirror.store.parent for mirror in mirrors}:
        side = {mirror.store.name: mirror for mirror in mirrors if mirror.store.parent == parent}
        rows: dict[str, dict[str, ObjectInfo]] = {name: {} for name in side}
        for path, info in parent.tree().items():
            folder, _, name = path.partition("/")
            if name and folder in rows:
                rows[folder][name] = info
        for folder, mirror in side.items():
            mirror.listed(rows[folder])


def _top(name: str) -> str:
    return name.partition("/")[0]


def _is_work(name: str) -> bool:
    """Return whether a file of a work directory is of use on other machines, and stays in it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable() or set(name) & {*"\\:"}:
        return False
    unfinished = any(part.startswith(PREFIX) or part.endswith(SUFFIX) for part in path.parts)
    ours = path.name not in _HERE and path.suffix != _LOCK
    return ours and not unfinished and _CACHE not in path.parts[:-1]


def _looks(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class Lease:
    """A sign in a store, renewed every few seconds, that a process works in a folder.

    Stores have no locks. One that was killed leaves its sign; when it does not change for a while,
    the folder is free. Two that take it in the same moment notice at their next sign of life: until
    then they write the same bytes.

    Raises:
        BlockingIOError: another process shows that it lives.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._own, self._beats = path, uuid.uuid4().hex, 0
        self._taken, self._seen = False, 0.0  # when it was last known
        self._ended = Event()
        self._wait_for_others()
        self._beat()
        if self._taken:
            raise BlockingIOError
        self._thread = Thread(target=self._live, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `BlockingIOError` if another process has taken the folder over."""
        # the thread may sleep on when a machine wakes up: look at the clock of the world, too
        if not self._taken and abs(time.time() - self._seen) > _DEAD_SECONDS / 2:
            self._look()
        if self._taken:
            raise BlockingIOError

    def _look(self) -> None:
        began = time.time()
        self._taken = self._read()[:1] != [self._own]
        self._seen = began

    def close(self) -> None:
        """Give the folder free."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            if self._read()[:1] == [self._own]:
                self._path.unlink()

    def _wait_for_others(self) -> None:
        """Wait until the sign of another process is gone or old."""
        first, since = self._read(), time.monotonic()
        while first and time.monotonic() - since < _DEAD_SECONDS:
            time.sleep(_BEAT_SECONDS / 4)
            now = self._read()
            if now and now != first:
                raise BlockingIOError
            first = now

    def _live(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS) and not self._taken:
            # the next one may get through; what is no lease belongs to another
            with suppress(D3MError, TypeError, ValueError):
                self._look()
                if not self._taken:
                    self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._path.write_bytes(json.dumps([self._own, self._beats]).encode())
        self._look()

    def _read(self) -> list[object]:
        """Return who has the folder, and how often that was said; nothing where it is free."""
        while True:
            try:
                return list(json.loads(self._path.read_bytes()))
            except NotFoundError:
                return []
            except StorageError as error:
                if error.code != "E_STORAGE_BYTES":  # renewed while it was read
                    raise
