"""A work directory that many processes write to at the same time, each files of its own.

On a disk they see each other's. One in an object store has a mirror on each machine: files are sent
when they are complete, and those of others are fetched whenever a process has its turn.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d3pack.system.files import PREFIX
from d3pack.system.locks import exclusive
from d3pack.system.mirror import Lease, Mirror
from d3pack.system.objects import ObjectPath
from d3pack.system.shard import BusyError


class SharedFolder:
    """A work directory at a place, which others use too.

    Attributes:
        where: the place.
    """

    def __init__(self, where: Path | ObjectPath) -> None:
        self.where = where
        self._local: Path | None = None
        self._mirror: Mirror | None = None

    @property
    def local(self) -> Path:
        """Where its files are read and written while it is open."""
        if isinstance(self.where, Path):
            return self.where
        if self._local is None:
            self._local = Path(tempfile.gettempdir(), PREFIX + uuid.uuid4().hex, self.where.name)
        return self._local

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, or fetch it; at the end, what is new is in the store."""
        if isinstance(self.where, Path):
            self.where.mkdir(parents=True, exist_ok=True)
            yield
            return
        self._mirror = Mirror(self.where, self.local)
        try:
            self._mirror.fetch()
            yield
            self._mirror.send_all()
        finally:
            self._mirror.close()
            self._mirror = None

    @contextmanager
    def alone(self, lock: Path, *, wait: bool = False) -> Iterator[None]:
        """Be the only process to do something, and find what the one before has done.

        Args:
            lock: a name in the folder, which ends in `.lock`.
            wait: wait for others instead of raising.

        Raises:
            BlockingIOError: another process does it.
            BusyError: it has taken it over, because this one showed no sign of life.
        """
        if self._mirror is None:
            with exclusive(lock, wait=wait):
                yield
            return
        lease = _lease(self._mirror.store / lock.relative_to(self.local).as_posix(), wait=wait)
        try:
            self._mirror.fetch()
            yield
            _check(lease, lock.stem)
            self._mirror.send_all()
        finally:
            lease.close()


def _lease(path: ObjectPath, *, wait: bool) -> Lease:
    while True:
        try:
            return Lease(path)
        except BlockingIOError:
            if not wait:
                raise
            time.sleep(1.0)


def _check(lease: Lease, what: str) -> None:
    try:
        lease.check()
    except BlockingIOError:
        raise BusyError(
            f"another process has taken {what} over", hint="run this one again after it"
        ) from None
