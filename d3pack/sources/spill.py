"""Parts of objects that were read once, kept on the local disk within bounds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Hashable
from contextlib import suppress
from threading import Lock

LIMIT = 16 << 30  # bytes; also at most a quarter of what is free when the first part comes


class _Spill:
    """A temporary file without a name, which the system removes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self._left = min(LIMIT, free // 4)
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._end = 0
        self._lock = Lock()

    def __del__(self) -> None:
        self._file.close()

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            if key not in self._places:
                return None
            start, length = self._places[key]
            self._file.seek(start)
            return self._file.read(length)

    def put(self, key: Hashable, data: bytes) -> None:
        with self._lock, suppress(OSError):  # a full disk: the part is read from the store again
            if key in self._places or len(data) > self._left - self._end:
                return
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            self._places[key] = (self._end, len(data))
            self._end += len(data)


_spills: dict[int, _Spill] = {}  # by process: a fork must not write into its parent's file


def spilled(key: Hashable, fetch: Callable[[], bytes]) -> bytes:
    """Return a part of an object: from the local disk, or by `fetch` when it is first read."""
    spill = _spills.get(os.getpid())
    if spill is None:
        spill = _spills.setdefault(os.getpid(), _Spill())
    if (data := spill.get(key)) is None:
        data = fetch()
        spill.put(key, data)
    return data
