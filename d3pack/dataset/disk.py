"""The store on disk: memory-mapped for reading, checked on first touch, shared by processes."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.dataset import shelf
from d3pack.dataset.order import Ints
from d3pack.dataset.store import next_absent

_RESIDENT = 256 << 20  # bytes read before their pages are given back to the page cache


class DiskStore:
    """Images of one pack in one folder of the cache.

    Writers go through `pwrite`, so that a full disk is an error and not a SIGBUS, one at a time
    under a lock; the first writer of an image wins. Readers check an image when they first touch
    it, once a process.
    """

    def __init__(self, path: Path, held: int, identity: shelf.Identity) -> None:
        """Open the folder that `shelf.claim` gave, with the handle of its lock."""
        self.identity = identity
        self.path = path
        self._pixels_file = os.open(self.path / "pixels", os.O_RDWR | os.O_CLOEXEC)
        self._index_file = os.open(self.path / "index", os.O_RDWR | os.O_CLOEXEC)
        self.close = weakref.finalize(
            self, _close, (self._pixels_file, self._index_file, held)
        )  # gives the store back: others may evict it from then on
        self.close.atexit = False  # a thread may still write: its handles must not become others'
        self._map = mmap.mmap(self._pixels_file, 0, prot=mmap.PROT_READ)
        self._rows = np.frombuffer(self._map, dtype=np.uint8).reshape(identity.images, identity.row)
        index = mmap.mmap(self._index_file, 0, prot=mmap.PROT_READ)
        self._index = np.frombuffer(index, dtype=shelf.RECORD)
        self._sound = np.zeros(identity.images, dtype=np.bool_)
        self._all_sound = False
        self._writing = threading.Lock()
        self._full = False
        self._read_bytes = 0

    def missing(self, numbers: Ints) -> Ints:
        if self._all_sound:
            return numbers[:0]
        unsure = numbers[~self._sound[numbers]]
        if not unsure.size:
            return unsure
        present = self._index[unsure] != 0
        bad = [n for n in unsure[present].tolist() if not self._check(n)]
        if bad:
            self._drop(bad)
        self._all_sound = bool(self._sound.all())
        return unsure[~self._sound[unsure]]

    def _check(self, number: int) -> bool:
        good = shelf.record_of(number, self._rows[number].data) == int(self._index[number])
        self._sound[number] = good
        self._touched(1)
        return good

    def _touched(self, images: int) -> None:
        """Keep the pages that count as this process's bounded, however many images there are."""
        self._read_bytes += images * self.identity.row
        if self._read_bytes > _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = 0

    def _drop(self, bad: list[int]) -> None:
        warnings.warn(
            f"{len(bad)} image(s) in {self.path} fail their checksum and are decoded again",
            RuntimeWarning,
            stacklevel=2,
        )
        with self._writing:
            shelf.lock(self._index_file)
            try:
                shelf.drop(self._index_file, self._index, (n for n in bad if not self._check(n)))
            finally:
                shelf.unlock(self._index_file)

    def write(self, numbers: Ints, images: Tensor) -> None:
        if self._full or not self.close.alive:
            return
        rows = images.cpu().numpy().reshape(len(numbers), -1)
        with self._writing:
            shelf.lock(self._index_file)
            try:
                for number, row in zip(numbers.tolist(), rows, strict=True):
                    self._write_one(number, row)
            except OSError as error:
                self._full = True
                warnings.warn(
                    f"the store {self.path} takes no more images ({error.strerror}): going on, "
                    "decoding what it does not hold; free space or set cache=None",
                    RuntimeWarning,
                    stacklevel=2,
                )
            finally:
                shelf.unlock(self._index_file)

    def _write_one(self, number: int, row: npt.NDArray[np.uint8]) -> None:
        if self._index[number]:
            return
        _pwrite(self._pixels_file, row.data, number * self.identity.row)
        record = np.array([shelf.record_of(number, row.data)], dtype=shelf.RECORD)
        _pwrite(self._index_file, record.data.cast("B"), number * shelf.RECORD.itemsize)
        self._sound[number] = True

    def read(self, numbers: Ints) -> Tensor:
        rows = self._rows.take(numbers, axis=0)
        self._touched(len(numbers))
        return torch.from_numpy(rows).view(len(numbers), *self.identity.shape)

    def wanted(self, count: int, but: Ints) -> Ints:
        return next_absent(self._index == 0, count, but)

    def ready(self) -> int:
        return int(np.count_nonzero(self._index))


def _close(handles: tuple[int, ...]) -> None:
    for handle in handles:
        os.close(handle)


def _pwrite(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
