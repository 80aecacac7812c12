"""The lock: which files a backbone consists of, and that they are the very ones.

Nothing is parsed before its size and sha256 are checked against the `BackboneRef`, and nothing is
used that was written to between the check and the end of its reading. Hashing gigabytes at every
start would be no use, so a full verification is remembered by (path, device, inode, size, mtime,
ctime), unless the file was written to just now; a memory that disagrees is never believed, the file
is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from d3pack.errors import BackboneChangedError, BackboneError, D3MError, NotFoundError
from d3pack.format.recipe import BackboneRef, FileLock
from d3pack.system import write_text

FileProgress = Callable[[str, int, int], None]  # file, bytes done, bytes in all

SUFFIXES = (".safetensors", ".json", ".txt")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_CHUNK = 1 << 22
_TICK = 2_000_000_000  # nanoseconds; the coarsest clock of a file system in use


def cache_home() -> Path:
    """What d3pack may lose: $D3PACK_HOME, $XDG_CACHE_HOME/d3pack or ~/.cache/d3pack."""
    if home := os.environ.get("D3PACK_HOME"):
        return Path(home)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "d3pack"
    return Path.home() / ".cache" / "d3pack"


def check_path(path: str) -> None:
    """Refuse every file name that has no business in a backbone."""
    parts = path.split("/")
    if len(parts) > 4 or not all(_PART.fullmatch(part) for part in parts):
        raise BackboneError(
            f"{path!r} is not a plain relative file name", code="E_BACKBONE_REFUSED"
        )
    if path.endswith(_PICKLES):
        raise BackboneError(
            f"{path} is a pickle, which can run code",
            code="E_BACKBONE_REFUSED",
            hint="use a copy in safetensors",
        )
    if not path.endswith(SUFFIXES):
        raise BackboneError(f"{path} is not {', '.join(SUFFIXES)}", code="E_BACKBONE_REFUSED")


def listing(root: Path) -> tuple[str, ...]:
    """Relative POSIX paths of the files below a directory, two levels deep: diffusers' layout."""
    if not root.is_dir():
        raise NotFoundError(f"there is no backbone directory {root}")
    found = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_file()]
    return tuple(sorted(p.relative_to(root).as_posix() for p in found))


def lock_files(
    root: Path,
    paths: Iterable[str],
    progress: FileProgress | None = None,
) -> dict[str, FileLock]:
    """Hash the files of a directory, as they are."""
    locks = {}
    with _Memory() as memory:
        for path in sorted(paths):
            check_path(path)
            target = _inside(root, path)
            known = memory.get(_identity(target, target.stat()))
            digest = known or memory.hash(path, target, progress)[0]
            locks[path] = FileLock(target.stat().st_size, digest)
    return locks


@dataclass(frozen=True, slots=True)
class Checked:
    """A file whose bytes were the locked ones, as it was then."""

    path: Path
    sha256: str
    identity: str

    def unchanged(self) -> bool:
        """Whether nobody wrote to it since."""
        return _identity(self.path, self.path.stat()) == self.identity


def verify_files(
    root: Path, ref: BackboneRef, progress: FileProgress | None = None
) -> dict[str, Checked]:
    """Check every file of a lock, and say what to read. Raises at the first difference."""
    if not root.is_dir():
        raise NotFoundError(f"there is no backbone directory {root}")
    found = {}
    with _Memory() as memory:
        for path, lock in sorted(ref.files.items()):
            check_path(path)
            target = _inside(root, path)
            status = target.stat()
            if status.st_size != lock.size:
                raise changed(path, f"{status.st_size} bytes instead of {lock.size}")
            identity = _identity(target, status)
            if memory.get(identity) != lock.sha256:
                digest, identity = memory.hash(path, target, progress)
                if digest != lock.sha256:
                    raise changed(path, f"sha256 {digest[:12]}, not {lock.sha256[:12]}")
            found[path] = Checked(target, lock.sha256, identity)
    return found


def changed(path: str, how: str) -> BackboneChangedError:
    """The error for a file that is not what its lock says."""
    return BackboneChangedError(
        f"{path} is not the locked file: {how}",
        hint="fetch the locked revision again, or encode anew with this backbone",
    )


def _inside(root: Path, path: str) -> Path:
    """The regular file behind a name. Links may lead about a Hub cache entry, never out of it."""
    try:
        target = (root / path).resolve(strict=True)
    except (OSError, RuntimeError):
        raise BackboneError(
            f"{path} is missing in {root}",
            code="E_BACKBONE_MISSING",
            hint="fetch the whole repository again",
        ) from None
    home = root.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # a Hub cache: blobs of the repository, and shared ones
        home = home.parent.parent
        homes = [home, home.parent / "blobs"]
    if not any(map(target.is_relative_to, homes)):
        raise BackboneError(f"{path} is a link that leads out of {home}", code="E_BACKBONE_REFUSED")
    if not stat.S_ISREG(target.stat().st_mode):
        raise BackboneError(f"{path} is not a regular file", code="E_BACKBONE_REFUSED")
    return target


class _Memory:
    """What was hashed before, in one small JSON file; worthless contents are thrown away."""

    def __init__(self) -> None:
        self._path = cache_home() / "verified.json"
        self._known: dict[str, str] = {}
        self._news = False

    def __enter__(self) -> _Memory:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            known = {}
        if isinstance(known, dict):
            self._known = {str(k): v for k, v in known.items() if isinstance(v, str)}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._news:
            return
        with suppress(OSError, D3MError):  # a read-only or full home only costs time
            known = dict(sorted(self._known.items())[-10_000:])
            write_text(self._path, json.dumps(known, indent=0))

    def get(self, identity: str) -> str | None:
        return self._known.get(identity)

    def hash(self, path: str, target: Path, progress: FileProgress | None) -> tuple[str, str]:
        """The sha256 of a file, and the identity that the file had all the while."""
        digest, done, began = hashlib.sha256(), 0, time.time_ns()
        try:
            with target.open("rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress:
                        progress(path, done, before.st_size)
        except OSError as error:
            raise BackboneError(
                f"{path} cannot be read: {error.strerror}", code="E_BACKBONE_MISSING"
            ) from None
        identity = _identity(target, before)
        if identity != _identity(target, target.stat()):
            raise changed(path, "it was written to while it was read")
        if _settled(before, began):
            self._known[identity] = digest.hexdigest()
            self._news = True
        return digest.hexdigest(), identity


def _identity(target: Path, status: os.stat_result) -> str:
    # a program can set the time of modification back, not that of the change
    times = (status.st_mtime_ns, status.st_ctime_ns)
    numbers = (status.st_dev, status.st_ino, status.st_size, *times)
    return "|".join((str(target), *map(str, numbers)))


def _settled(status: os.stat_result, now: int) -> bool:
    """Whether whoever writes to the file from now on gives it other times: clocks tick coarsely."""
    return all(abs(now - t) >= _TICK for t in (status.st_mtime_ns, status.st_ctime_ns))
