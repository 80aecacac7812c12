"""The canonical writer: one Pack, one sequence of bytes; a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from d3pack import container
from d3pack.canonical import dumps, plain
from d3pack.errors import D3MError, NotFoundError
from d3pack.format.reader import read
from d3pack.pack import Pack


def pack_bytes(pack: Pack) -> bytes:
    """The bytes of the file; what our own reader would refuse is never handed out."""
    manifest = pack.manifest
    placed = container.slots(plain(manifest["sections"]), len(pack.classes))
    data = b"".join((
        container.header(dumps(manifest), placed), *container.body(placed, pack.sections())
    ))  # fmt: skip
    read(data)
    return data


def write(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Write a pack so that a crash at any moment leaves the old file or the new one."""
    replace_file(Path(path), pack_bytes(pack))


def replace_file(path: Path, data: bytes) -> None:
    """Put bytes in place of a file: temporary file, fsync, rename, fsync of the directory."""
    folder = path.parent
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=folder)
    except FileNotFoundError:
        raise NotFoundError(f"{folder} is not a directory", hint="create it first") from None
    except OSError as error:
        raise D3MError(f"cannot write into {folder}: {error.strerror}") from None
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, _mode(path))
            os.fsync(fd)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise D3MError(f"cannot write {path}: {error.strerror}") from None
        raise
    _sync_folder(folder)


def _mode(path: Path) -> int:
    """The old file's mode, or what a plain open() would give; mkstemp's 0600 is for secrets."""
    try:
        return path.stat().st_mode & 0o7777
    except OSError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise D3MError(f"cannot sync {folder}: {error.strerror}") from None
    finally:
        os.close(fd)
