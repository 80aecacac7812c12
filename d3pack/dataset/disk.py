"""Decoded images on disk: the store of a pack, and the list of all stores of a cache.

    <home>/images/<key>/meta.json   what the images are: root of the pack, numerics, device, shape
                        pixels      uint8 rows, sparse until decoded
                        index       one 64-bit record an image: 0, or 1 << 32 | CRC-32
                        lock        held shared by every process that uses the store
                        claims      empty; byte i is locked by the process that decodes image i
                  gate              held while a store is added

A store appears by one rename, a record is written after its pixels, and a store disappears by one
rename: a process that is killed at any point leaves a smaller cache, never a wrong one. Claims only
spare work: where the file system has no locks, two processes may decode the same image.

On NFS, a lock of a file shows what other machines wrote into it before they unlocked it: pixels are
locked while they are written, and the index when an image is claimed.

torch is imported only where images are read, so that `d3pack cache` starts fast.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from d3pack.dataset.order import Ints
from d3pack.system import Lock, lock, locked, replace_folder, try_lock_byte, unlock_byte

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
_RECORD = np.dtype("<u8")
_PRESENT = 1 << 32
_FILES = ("meta.json", "pixels", "index", "lock", "claims")
_RESIDENT = 256 << 20  # bytes read before their pages are given back to the page cache
_STALE = 3600  # seconds after which half-made and half-removed folders are cleared
# Windows renames no folder while a file in it is open
_RENAMES_OPEN_FOLDERS = os.name != "nt"


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """Everything that decides about the bytes of the images; equal identities share a store."""

    root: str  # of the pack: prompts, seeds and the recipe are in it
    numerics: str
    device: str  # kernels of different kinds of device differ in the last bit
    software: str
    images: int
    shape: tuple[int, int, int]

    @property
    def key(self) -> str:
        """The name of the store's folder."""
        text = json.dumps([FORMAT, *asdict(self).values()], separators=(",", ":"))
        return sha256(text.encode()).hexdigest()[:32]

    @property
    def row(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        """Bytes of the complete store."""
        return self.images * (self.row + _RECORD.itemsize)


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One store of the list."""

    path: Path
    identity: StoreIdentity | None  # None: of another version of d3pack, or damaged
    used: float  # time of the last use, in seconds since the epoch
    on_disk: int  # bytes allocated
    decoded: int  # images present

    @property
    def size(self) -> int:
        """Bytes that it may take: a known store may still be growing."""
        return self.on_disk if self.identity is None else self.identity.size


def record_of(number: int, row: bytes | memoryview) -> int:
    """Return the index record of an image: present, and a checksum of its number and pixels."""
    return _PRESENT | zlib.crc32(row, number & 0xFFFFFFFF)


def next_absent(absent: npt.NDArray[np.bool_], count: int, after: Ints) -> Ints:
    """Return the first `count` absent numbers behind those of `after`, from 0 again at the end."""
    if count <= 0:
        return np.empty(0, np.int64)
    start = int(after.max()) + 1
    numbers = np.flatnonzero(absent)
    numbers = np.concatenate([numbers[numbers >= start], numbers[numbers < start]])
    return numbers[~np.isin(numbers, after)][:count]


# All stores of a cache


def list_stores(home: Path) -> list[StoreEntry]:
    """Return every store of a cache in the order of eviction: unusable ones, then by last use."""
    entries = []
    folder = _stores(home)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        identity, decoded = _read_meta(path), 0
        if identity is None and not _looks_like_a_store(path):
            continue
        with contextlib.suppress(OSError):
            if identity is not None:
                decoded = int(np.count_nonzero(np.fromfile(path / "index", dtype=_RECORD)))
            used = (path if identity is None else path / "meta.json").stat().st_mtime
            entries.append(StoreEntry(path, identity, used, _on_disk(path), decoded))
    return sorted(entries, key=lambda entry: (entry.identity is not None, entry.used))


def store_in_use(path: Path) -> bool:
    """Return whether a live process uses the store, or it belongs to another user."""
    try:
        lock(path / "lock", create=False).close()
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return False


def remove_store(path: Path) -> bool:
    """Remove a store; return False if a live process uses it, or it belongs to another user."""
    alone: Lock | None = None
    try:
        alone = lock(path / "lock", create=False)
    except FileNotFoundError:
        pass
    except (BlockingIOError, PermissionError):
        return False
    try:
        if alone is not None and not _RENAMES_OPEN_FOLDERS:
            alone.close()  # from now on the rename fails if somebody opens the store
        removed = path.parent / f".gone-{path.name}-{os.getpid()}-{time.monotonic_ns()}"
        os.rename(path, removed)
        shutil.rmtree(removed, ignore_errors=True)
    except FileNotFoundError:
        pass
    except PermissionError:
        return False
    finally:
        if alone is not None:
            alone.close()
    return True


def verify_store(entry: StoreEntry) -> list[int]:
    """Check the checksum of every image; drop the bad ones and return their numbers.

    Raises:
        PermissionError: the store belongs to another user.
    """
    if entry.identity is None:
        return []
    row = entry.identity.row
    bad: list[int] = []
    handle = _open(entry.path / "index")
    try:
        with locked(handle):
            index = np.fromfile(entry.path / "index", dtype=_RECORD)
            with open(entry.path / "pixels", "rb") as pixels:
                for number in np.flatnonzero(index).tolist():
                    pixels.seek(number * row)
                    if record_of(number, pixels.read(row)) != int(index[number]):
                        bad.append(number)
            _drop(handle, index, bad)
    finally:
        os.close(handle)
    return bad


def stored_bytes(home: Path, identity: StoreIdentity) -> int:
    """Return the bytes that the store of these images takes already; 0 if there is none."""
    path = _stores(home) / identity.key
    return _on_disk(path) if _read_meta(path) == identity else 0


def open_disk_store(home: Path, identity: StoreIdentity, limit: int) -> DiskStore | None:
    """Open the store of these images, created if there is none.

    Args:
        home: the cache.
        identity: what the images are.
        limit: bytes that all stores of the cache may take together.

    Returns:
        The store, or None if it does not fit even when all unused stores are evicted.

    Raises:
        OSError: the cache cannot be written.
    """
    _stores(home).mkdir(parents=True, exist_ok=True)
    # without the lock two processes could both count the same free space
    with lock(_stores(home) / "gate", wait=True):
        return _open_or_create(home, identity) if _make_room(home, identity, limit) else None


def _open_or_create(home: Path, identity: StoreIdentity) -> DiskStore:
    path = _stores(home) / identity.key
    while True:
        if _read_meta(path) != identity:
            if path.exists() and not remove_store(path):
                raise OSError(f"{path} is damaged and in use")
            _create(path, identity)
        try:
            held = lock(path / "lock", shared=True, wait=True, create=False)
        except FileNotFoundError:
            continue
        try:
            if _locks(held, path):
                return DiskStore(path, held, identity)
        except BaseException:
            held.close()
            raise
        held.close()


def _locks(held: Lock, path: Path) -> bool:
    """Return whether a store is still the one that was locked, and note its use."""
    try:
        os.utime(path / "meta.json")
        return os.path.samestat(os.fstat(held.fileno()), os.stat(path / "lock"))
    except FileNotFoundError:
        return False


def _create(path: Path, identity: StoreIdentity) -> None:
    """Create an empty store, unless another process is faster."""
    meta = {"format": FORMAT, **asdict(identity), "shape": list(identity.shape)}
    with replace_folder(path) as folder:
        with open(folder / "pixels", "wb") as pixels:
            pixels.truncate(identity.images * identity.row)
        (folder / "index").write_bytes(bytes(identity.images * _RECORD.itemsize))
        (folder / "lock").touch()
        text = json.dumps(meta, indent=2, sort_keys=True)
        (folder / "meta.json").write_text(text + "\n", encoding="utf-8")


def _make_room(home: Path, identity: StoreIdentity, limit: int) -> bool:
    """Evict the stores that were not used for longest until this one fits, at its full size."""
    _remove_stale(home)
    others = [entry for entry in list_stores(home) if entry.path.name != identity.key]
    in_use = sum(entry.size for entry in others if store_in_use(entry.path))
    if identity.size + in_use > limit:
        return False  # evicting the rest would not help
    total = identity.size + sum(entry.size for entry in others)
    for entry in others:
        if total <= limit:
            break
        if remove_store(entry.path):
            total -= entry.size
    return total <= limit


def _remove_stale(home: Path) -> None:
    """Remove what killed processes left: half-made and half-removed folders."""
    for path in _stores(home).glob(".*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(path, ignore_errors=True)


def _stores(home: Path) -> Path:
    return home / "images"


def _read_meta(path: Path) -> StoreIdentity | None:
    """Return the identity that a store claims, or None unless it is complete."""
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        shape = tuple(int(side) for side in meta["shape"])
        texts = {name: str(meta[name]) for name in ("root", "numerics", "device", "software")}
        identity = StoreIdentity(
            **texts, images=int(meta["images"]), shape=(shape[0], shape[1], shape[2])
        )
        complete = (
            meta["format"] == FORMAT
            and (path / "pixels").stat().st_size == identity.images * identity.row
            and (path / "index").stat().st_size == identity.images * _RECORD.itemsize
            and (path / "lock").exists()
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return identity if complete else None


def _looks_like_a_store(path: Path) -> bool:
    """Return whether a folder is named by a key and holds one of our files.

    Folders that a person has put there are never listed or evicted.
    """
    named = len(path.name) == 32 and set(path.name) <= set("0123456789abcdef")
    return named and any((path / name).is_file() for name in _FILES)


def _on_disk(path: Path) -> int:
    total = 0
    for name in _FILES:
        with contextlib.suppress(OSError):
            status = (path / name).stat()
            total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return total


# One store


class DiskStore:
    """The images of one pack, memory-mapped, checked on first touch and shared by processes.

    Images are written by system calls, so that a full disk is an error and not a signal, by one
    process at a time under a lock; the first writer of an image wins. Each process checks an image
    when it first reads it.
    """

    def __init__(self, path: Path, held: Lock, identity: StoreIdentity) -> None:
        """Open a store that `open_disk_store` has locked."""
        self.identity = identity
        self.path = path
        self._pixels_file = _open(path / "pixels")
        self._index_file = _open(path / "index")
        self._claims_file = _open(path / "claims", os.O_CREAT)
        # releases the store, which others may evict from then on
        files = (self._pixels_file, self._index_file, self._claims_file)
        self.close = weakref.finalize(self, _close, files, held)
        self.close.atexit = False  # a thread may still write, and descriptors are used again
        self._map = mmap.mmap(self._pixels_file, 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._map, dtype=np.uint8).reshape(identity.images, identity.row)
        index = mmap.mmap(self._index_file, 0, access=mmap.ACCESS_READ)
        self._index = np.frombuffer(index, dtype=_RECORD)
        self._checked = np.zeros(identity.images, dtype=np.bool_)
        self._all_checked = False
        self._writing = threading.Lock()
        self._full = False
        self._read_bytes = 0

    def missing(self, numbers: Ints) -> Ints:
        if self._all_checked:
            return numbers[:0]
        unchecked = numbers[~self._checked[numbers]]
        if not unchecked.size:
            return unchecked
        present = self._index[unchecked] != 0
        bad = [n for n in unchecked[present].tolist() if not self._check(n)]
        if bad:
            self._drop(bad)
        self._all_checked = bool(self._checked.all())
        return unchecked[~self._checked[unchecked]]

    def _check(self, number: int) -> bool:
        good = record_of(number, self._rows[number].data) == int(self._index[number])
        self._checked[number] = good
        self._count_read(1)
        return good

    def _count_read(self, images: int) -> None:
        """Bound the pages that count as memory of this process, however many images there are."""
        self._read_bytes += images * self.identity.row
        if self._read_bytes > _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = 0

    def _drop(self, bad: list[int]) -> None:
        with self._writing, locked(self._index_file), locked(self._pixels_file):
            # another process may have decoded some of them again
            bad = [n for n in bad if not self._check(n)]
            _drop(self._index_file, self._index, bad)
        if bad:
            warnings.warn(
                f"{len(bad)} image(s) in {self.path} fail their checksum and are decoded again",
                RuntimeWarning,
                stacklevel=2,
            )

    def write(self, numbers: Ints, images: Tensor) -> None:
        """Store images; when the disk is full, warn once and store no more."""
        if self._full or not self.close.alive:
            return
        rows = images.cpu().numpy().reshape(len(numbers), -1)
        try:
            with self._writing, locked(self._index_file):
                new = self._index[numbers] == 0
                self._write_new(numbers[new], rows[new])
        except OSError as error:
            self._full = True
            warnings.warn(
                f"cannot write to the store {self.path} ({error.strerror}): images that it does "
                "not hold are decoded each time; free disk space or set cache=None",
                RuntimeWarning,
                stacklevel=2,
            )

    def _write_new(self, numbers: Ints, rows: npt.NDArray[np.uint8]) -> None:
        with locked(self._pixels_file):
            for number, row in zip(numbers.tolist(), rows, strict=True):
                _write_at(self._pixels_file, row.data, number * self.identity.row)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            record = np.array([record_of(number, row.data)], dtype=_RECORD)
            _write_at(self._index_file, record.data.cast("B"), number * _RECORD.itemsize)
            self._checked[number] = True

    def read(self, numbers: Ints) -> Tensor:
        import torch

        rows = self._rows.take(numbers, axis=0)
        self._count_read(len(numbers))
        return torch.from_numpy(rows).view(len(numbers), *self.identity.shape)

    @contextlib.contextmanager
    def claimed(self, wanted: Ints, group: int) -> Iterator[Ints]:
        claims: list[int] = []
        try:
            self._claim(wanted, len(wanted), claims)
            count = group if not claims else -len(claims) % group
            if count:
                others = next_absent(self._index == 0, len(self._index), wanted)
                self._claim(others, len(claims) + count, claims)
            yield np.array(claims, dtype=np.int64)
        finally:
            for number in claims:
                unlock_byte(self._claims_file, number)

    def _claim(self, numbers: Ints, most: int, claims: list[int]) -> None:
        """Add images that nobody else is decoding, until there are `most` claims."""
        free = (n for n in map(int, numbers) if try_lock_byte(self._claims_file, n))
        while new := list(islice(free, most - len(claims))):
            claims += new
            with locked(self._index_file, shared=True):
                done = [number for number in new if self._index[number]]
            for number in done:  # by another process, since it was seen to be absent
                claims.remove(number)
                unlock_byte(self._claims_file, number)

    def count(self) -> int:
        return int(np.count_nonzero(self._index))


def _open(path: Path, flags: int = 0) -> int:
    """Open a file of a store; Windows would otherwise translate line ends."""
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | flags, 0o666)


def _close(handles: tuple[int, ...], held: Lock) -> None:
    for handle in handles:
        os.close(handle)
    held.close()


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset; the caller holds the lock of the index."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(handle, data, offset)
        else:  # Windows
            os.lseek(handle, offset, os.SEEK_SET)
            written = os.write(handle, data)
        data, offset = data[written:], offset + written


def _drop(handle: int, index: npt.NDArray[np.uint64], numbers: Iterable[int]) -> None:
    """Mark images as absent in the open index, whose lock the caller holds."""
    for number in numbers:
        if index[number]:
            _write_at(handle, memoryview(bytes(_RECORD.itemsize)), number * _RECORD.itemsize)
