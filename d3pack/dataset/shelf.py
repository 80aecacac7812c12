"""Where decoded images lie on disk: one folder a store, listed, evicted, verified. No torch here.

    <home>/images/<key>/meta.json   what the images are: pack root, mode, device kind, shape
                        pixels      uint8 rows, sparse until decoded
                        index       one 64-bit record an image: 0, or 1 << 32 | CRC-32
                        lock        held shared by whoever uses the store
                  gate              held while a store is added

A store appears by one rename, a record is written after its pixels, and a store leaves by one
rename: a process killed at any point leaves a smaller cache, never a wrong one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if sys.platform != "win32":  # there, equal bytes alone make two writers harmless
    import fcntl

FORMAT = 1
RECORD = np.dtype("<u8")
_PRESENT = 1 << 32
_FILES = ("meta.json", "pixels", "index", "lock")


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that decides about the bytes of the images; two equal identities share a store."""

    root: str  # of the pack: prompts, seeds and the whole recipe are in it
    mode: str
    device: str  # kernels differ between kinds of device, in the last bit
    software: str
    images: int
    shape: tuple[int, int, int]

    @property
    def key(self) -> str:
        text = json.dumps([FORMAT, *asdict(self).values()], separators=(",", ":"))
        return sha256(text.encode()).hexdigest()[:32]

    @property
    def row(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        """Bytes of the whole store once it is full."""
        return self.images * (self.row + RECORD.itemsize)

    def meta(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One store as found on disk."""

    path: Path
    identity: Identity | None  # None: of another version of d3pack, or damaged
    used: float  # seconds since the epoch
    on_disk: int  # bytes allocated
    decoded: int  # images present

    @property
    def size(self) -> int:
        """Bytes it may take: a store that is known may still be growing."""
        return self.on_disk if self.identity is None else self.identity.size


def record_of(index: int, row: bytes | memoryview) -> int:
    """What the index says about an image: present, and the checksum of its number and pixels."""
    return _PRESENT | zlib.crc32(row, index & 0xFFFFFFFF)


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Take an advisory lock on an open file; False when somebody else holds it."""
    if sys.platform != "win32":
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            return False
    return True


def unlock(handle: int) -> None:
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_UN)


def _stores(home: Path) -> Path:
    return home / "images"


def _read_meta(path: Path) -> Identity | None:
    """The identity a store claims, or None if this is no whole store."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        shape = tuple(int(side) for side in meta["shape"])
        identity = Identity(
            root=str(meta["root"]),
            mode=str(meta["mode"]),
            device=str(meta["device"]),
            software=str(meta["software"]),
            images=int(meta["images"]),
            shape=(shape[0], shape[1], shape[2]),
        )
        whole = (
            meta["format"] == FORMAT
            and (path / "pixels").stat().st_size == identity.images * identity.row
            and (path / "index").stat().st_size == identity.images * RECORD.itemsize
            and (path / "lock").exists()
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return identity if whole else None


def _create(path: Path, identity: Identity) -> None:
    """Make an empty store appear at `path`, unless somebody else was faster."""
    fresh = path.parent / f".new-{identity.key}-{os.getpid()}-{time.monotonic_ns()}"
    fresh.mkdir()
    try:
        with open(fresh / "pixels", "wb") as pixels:
            pixels.truncate(identity.images * identity.row)
        (fresh / "index").write_bytes(bytes(identity.images * RECORD.itemsize))
        (fresh / "lock").touch()
        text = json.dumps(identity.meta(), indent=2, sort_keys=True)
        (fresh / "meta.json").write_text(text + "\n", encoding="utf-8")
        os.rename(fresh, path)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if _read_meta(path) is None:
            raise


def claim(home: Path, identity: Identity, limit: int) -> tuple[Path, int] | None:
    """The store's folder, made if need be, and the handle of its lock, held shared.

    None when it does not fit under `limit` bytes, even after evicting what nobody uses.
    """
    _stores(home).mkdir(parents=True, exist_ok=True)
    gate = os.open(_stores(home) / "gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock(gate)  # two newcomers at once must not both count the same free room
        return _open_folder(home, identity) if _make_room(home, identity, limit) else None
    finally:
        os.close(gate)


def _open_folder(home: Path, identity: Identity) -> tuple[Path, int]:
    path = _stores(home) / identity.key
    while True:
        if _read_meta(path) != identity:
            if path.exists() and not remove(path):
                raise OSError(f"{path} is damaged and in use")
            _create(path, identity)
        try:
            handle = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        lock(handle, shared=True)
        # Somebody may have evicted the folder between the opening and the lock.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path / "lock")):
                os.utime(path / "meta.json")
                return path, handle
        os.close(handle)


def held(home: Path, identity: Identity) -> int:
    """Bytes that the store of these images takes already; 0 when there is none."""
    path = _stores(home) / identity.key
    return _on_disk(path) if _read_meta(path) == identity else 0


def entries(home: Path) -> list[Entry]:
    """Every store below `home` in the order of eviction: of no use here, then longest unused."""
    found = []
    folder = _stores(home)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        identity, decoded = _read_meta(path), 0
        if identity is None and not _looks_like_a_store(path):
            continue
        with contextlib.suppress(OSError):
            if identity is not None:
                decoded = int(np.count_nonzero(np.fromfile(path / "index", dtype=RECORD)))
            used = (path if identity is None else path / "meta.json").stat().st_mtime
            found.append(Entry(path, identity, used, _on_disk(path), decoded))
    return sorted(found, key=lambda entry: (entry.identity is not None, entry.used))


def _looks_like_a_store(path: Path) -> bool:
    """Named by a key and with a file of ours: nobody's folder of pictures is ever evicted."""
    named = len(path.name) == 32 and set(path.name) <= set("0123456789abcdef")
    return named and any((path / name).is_file() for name in _FILES)


def _on_disk(path: Path) -> int:
    total = 0
    for name in _FILES:
        with contextlib.suppress(OSError):
            stat = (path / name).stat()
            total += getattr(stat, "st_blocks", -(-stat.st_size // 512)) * 512
    return total


def in_use(path: Path) -> bool:
    """Whether a live process holds the store, or it is another user's."""
    try:
        handle = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return True
    except OSError:
        return False
    try:
        return not lock(handle, wait=False)
    finally:
        os.close(handle)


def remove(path: Path) -> bool:
    """Take a store away; False when a live process uses it, or it is another user's."""
    try:
        handle = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        handle = -1
    except PermissionError:
        return False
    try:
        if handle >= 0 and not lock(handle, wait=False):
            return False
        gone = path.parent / f".gone-{path.name}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
        except FileNotFoundError:
            pass
        except PermissionError:
            return False
        return True
    finally:
        if handle >= 0:
            os.close(handle)


def _sweep(home: Path) -> None:
    """Clear what killed processes left: half-made and half-removed folders older than an hour."""
    for path in _stores(home).glob(".*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(path, ignore_errors=True)


def _make_room(home: Path, identity: Identity, limit: int) -> bool:
    """Evict the longest unused stores until this one, grown to its full size, fits the limit."""
    _sweep(home)
    others = [entry for entry in entries(home) if entry.path.name != identity.key]
    held = sum(entry.size for entry in others if in_use(entry.path))
    if identity.size + held > limit:
        return False  # evicting the rest would not help
    # A store counts with its full size: it may still be growing.
    total = identity.size + sum(entry.size for entry in others)
    for entry in others:
        if total <= limit:
            break
        if remove(entry.path):
            total -= entry.size
    return total <= limit


def drop(handle: int, index: npt.NDArray[np.uint64], numbers: Iterator[int]) -> None:
    """Mark images as absent; `handle` is the open index file, its lock held."""
    for number in numbers:
        if index[number]:
            os.pwrite(handle, bytes(RECORD.itemsize), number * RECORD.itemsize)


def verify(entry: Entry) -> list[int]:
    """Check every image present against its record; the bad ones are dropped and returned."""
    if entry.identity is None:
        return []
    row = entry.identity.row
    bad: list[int] = []
    handle = os.open(entry.path / "index", os.O_RDWR | os.O_CLOEXEC)
    try:
        lock(handle)
        index = np.fromfile(entry.path / "index", dtype=RECORD)
        with open(entry.path / "pixels", "rb") as pixels:
            for number in np.flatnonzero(index).tolist():
                pixels.seek(number * row)
                if record_of(number, pixels.read(row)) != int(index[number]):
                    bad.append(number)
        drop(handle, index, iter(bad))
    finally:
        os.close(handle)
    return bad
