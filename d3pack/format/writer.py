"""The canonical writer: one Pack, one sequence of bytes; a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from d3pack.errors import D3MError, NotFoundError, UsageError
from d3pack.format import container
from d3pack.format.canonical import dumps, plain
from d3pack.format.carried import carried_files
from d3pack.format.pack import Pack
from d3pack.format.reader import BINARY, read


def pack_bytes(pack: Pack) -> bytes:
    """The bytes of the file; what our own reader would refuse is never handed out."""
    manifest = pack.manifest
    placed = container.slots(plain(manifest["sections"]), len(pack.classes))
    data = b"".join((
        container.header(dumps(manifest), placed), *container.body(placed, pack.sections())
    ))  # fmt: skip
    carried_files(read(data))
    return data


def write(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Write a pack so that a crash at any moment leaves the old file or the new one.

    A link is followed; a device or a pipe is refused, for it would be replaced by a file.
    """
    replace_file(Path(path), pack_bytes(pack))


def replace_file(path: Path, data: bytes) -> None:
    """Put bytes in place of a file: temporary file, fsync, rename, fsync of the directory."""
    # In the same directory, or the rename would be a copy; not `tempfile`, which costs every
    # start of the command five milliseconds.
    if not path.name or "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not the name of a file")
    path = Path(os.path.realpath(path))  # through a link to the file that is meant
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file", hint="choose another output")
    temporary = path.with_name(f".d3pack-{os.urandom(8).hex()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path.parent} is not a directory", hint="create it first") from None
    except OSError as error:
        raise D3MError(f"cannot write into {path.parent}: {error.strerror}") from None
    try:
        with open(fd, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:  # a raw write may take a part only
                view = view[file.write(view) :]
            with contextlib.suppress(FileNotFoundError):  # no old file: the umask has decided
                os.chmod(temporary, os.stat(path).st_mode & 0o7777)
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise D3MError(f"cannot write {path}: {error.strerror}") from None
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename last: without this a power loss could undo it."""
    if os.name == "nt":
        return  # there, directories cannot be opened
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise D3MError(f"cannot sync {folder}: {error.strerror}") from None
