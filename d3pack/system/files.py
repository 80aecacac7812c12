"""Files and folders that are written completely or not at all.

Whatever is written goes to a temporary name beside its target, is flushed to the disk (fsync), and
renamed. A process that is killed leaves the old file or the new one, and perhaps a temporary, which
`remove_leftovers` clears away. A full disk is a `NoSpaceError`, whichever library meets it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d3pack.errors import D3MError, NoSpaceError, NotFoundError, UsageError
from d3pack.system.objects import FULL, ObjectPath

# not `tempfile`, and `shutil` only on use: they cost every start of the command milliseconds
PREFIX, SUFFIX = ".d3pack-", ".part"  # of temporary names
_BLOCK = 1 << 22


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path in which a leading ~ is a home directory.

    Raises:
        UsageError: there is no such home, as for a user whom a container does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"no home directory is known for {os.fspath(path)!r}",
            hint="set HOME, or D3PACK_HOME for caches",
        ) from None


@contextmanager
def disk_full_as_error(where: str = "on the disk") -> Iterator[None]:
    """Raise `NoSpaceError` for a full disk or a used-up quota, however it was reported.

    Some libraries raise types of their own, with the system's message but without its number.
    """
    try:
        yield
    except D3MError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise NoSpaceError(
            f"no space left {where}",
            hint="free some and run the same command: finished work is kept",
        ) from error


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that the disk or a quota is full, in the words of any library."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None and "requested and" in text:
        return True  # numpy's words for a write that was cut short
    return getattr(error, "errno", None) in FULL or any(os.strerror(n) in text for n in FULL)


def is_unwritable(error: Exception) -> bool:
    """Whether an error says that nothing can be written at a place."""
    kinds = (PermissionError, NotADirectoryError, FileExistsError)
    return isinstance(error, kinds) or getattr(error, "errno", None) == errno.EROFS


def temporary_path(path: Path) -> Path:
    """Return a name in the folder of `path` that no other process or thread uses."""
    return path.with_name(f"{PREFIX}{os.urandom(8).hex()}{SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries that killed processes left below a folder.

    The caller holds the lock of the folder: temporaries of live processes go, too.
    """
    for parent, folders, names in os.walk(folder):
        for name in names:
            if name.endswith(SUFFIX):
                Path(parent, name).unlink(missing_ok=True)
        for name in [n for n in folders if n.startswith(PREFIX) and n.endswith(SUFFIX)]:
            folders.remove(name)
            _remove_tree(Path(parent, name))


@contextmanager
def writing(path: str | os.PathLike[str] | ObjectPath) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces the file at `path` when the block succeeds.

    The block creates the file. A link at `path` is followed, the old file's permissions are kept.
    What is meant for an object store is sent when it is complete.

    Raises:
        UsageError: `path` is a folder, a device or a pipe, which must not become a file.
        NoSpaceError: the disk is full.
        OSError: whatever else the system reports.
    """
    if isinstance(path, ObjectPath):
        with _uploading(path) as temporary:
            yield temporary
        return
    if not Path(path).name or "\0" in os.fspath(path):
        raise UsageError(f"{os.fspath(path)!r} is not the name of a file")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is not a regular file", hint="choose another output")
    temporary = temporary_path(target)
    try:
        with disk_full_as_error(f"to write {target.name}"):
            yield temporary
            with suppress(FileNotFoundError):  # a new file: the umask has decided
                os.chmod(temporary, os.stat(target).st_mode & 0o7777)
            _sync(temporary)
            os.replace(temporary, target)
    except BaseException:  # an interrupt, too: nobody needs half a file
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with disk_full_as_error(f"to write {target.name}"):
        _sync_folder(target.parent)


@contextmanager
def _uploading(path: ObjectPath) -> Iterator[Path]:
    """Yield a local path; its file is sent when the block succeeds."""
    from tempfile import TemporaryDirectory

    with disk_full_as_error(f"to write {path.name}"), TemporaryDirectory(prefix=PREFIX) as folder:
        file = Path(folder, path.name)
        yield file
        path.upload(file)


def replace_file(path: str | os.PathLike[str] | ObjectPath, data: bytes) -> None:
    """Write a file or an object so that a crash at any moment leaves the old one or the new one.

    Raises:
        UsageError: `path` is a folder, a device or a pipe, which must not become a file.
        NotFoundError: the folder of `path` does not exist.
        NoSpaceError: the disk is full.
        D3MError: the file cannot be written for another reason.
    """
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    try:
        with writing(path) as temporary, open(temporary, "xb", buffering=0) as file:
            view = memoryview(data)
            while view:  # a raw write may take a part only
                view = view[file.write(view) :]
    except OSError as error:
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise NotFoundError(f"{folder} is not a directory", hint="create it first") from None
        raise D3MError(f"cannot write {os.fspath(path)}: {error.strerror}") from error


def can_write(folder: Path) -> bool:
    """Return whether files can be made in a folder, which exists then: a home may be read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def create_file(path: Path, data: bytes) -> None:
    """Write a file unless there is one; of several that do the same, one is there whole."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in FULL:
                raise
            with suppress(FileExistsError), path.open("xb") as file:  # a file system without links
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | ObjectPath, text: str) -> None:
    """Write a text file like `replace_file`, and the folders that lead to it.

    Names of files may hold bytes that are no UTF-8: they are written as escapes.
    """
    with disk_full_as_error(f"to write {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path | ObjectPath, value: Any) -> None:
    """Write a value as JSON, indented and with sorted keys, like `write_text`."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder; it replaces the folder at `path` when the block succeeds.

    Only the folder that was at `path` when the block began is ever replaced. One that another
    process has put there since then stays, and the temporary folder is dropped.

    Raises:
        UsageError: `path` is a file.
        NoSpaceError: the disk is full.
        OSError: whatever else the system reports.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is not a folder", hint="choose another output")
    temporary = temporary_path(target)
    with disk_full_as_error(f"to write {target.name}"), _FolderId(target) as before:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for parent, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(parent, name))
                _sync_folder(Path(parent))
            _put(temporary, target, before)
            _sync_folder(target.parent)
        finally:
            _remove_tree(temporary)


def _put(temporary: Path, target: Path, before: _FolderId) -> None:
    """Rename a folder to `target`, in place of the one of `before` and of no other."""
    aside = _move_aside(target, before)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # else another process was faster, and its folder stays
            if aside is not None:
                os.rename(aside, target)
            raise
    if aside is not None:
        _remove_tree(aside)


def _move_aside(target: Path, before: _FolderId) -> Path | None:
    """Give the folder of `before` another name; None where another one is at `target`."""
    if not before.matches(target):
        return None
    aside = temporary_path(target)
    try:
        os.rename(target, aside)
    except FileNotFoundError:
        return None
    if before.matches(aside):
        return aside
    try:  # it was replaced between the look and the rename: the new one goes back
        os.rename(aside, target)
    except OSError:  # a third process has put one there meanwhile
        _remove_tree(aside)
    return None


class _FolderId:
    """Identity of a folder, which no later folder of the same name has."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            if os.name != "nt":  # an open folder keeps its inode number from being used again
                self._fd = os.open(path, os.O_RDONLY)
            self._status: os.stat_result | None = os.stat(path)
        except FileNotFoundError:
            self._status = None

    def __enter__(self) -> _FolderId:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def matches(self, path: Path) -> bool:
        try:
            return self._status is not None and os.path.samestat(self._status, os.stat(path))
        except OSError:
            return False


def _remove_tree(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file to the disk."""
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make a rename last: without this a power loss could undo it."""
    if os.name == "nt":
        return  # there, folders cannot be opened
    try:
        _sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise


def digest(path: Path | None) -> str | None:
    """Return the SHA-256 of a file, or of a folder's files and their names; None for None."""
    if path is None:
        return None
    if not path.exists():
        raise NotFoundError(f"there is no {path}")
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            part = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    part.update(block)
            # the name of a single file does not count
            name = str(file.relative_to(path).as_posix()) if path.is_dir() else ""
            total.update(hashlib.sha256(name.encode()).digest() + part.digest())
    return total.hexdigest()


def reserve(path: Path, start: int) -> None:
    """Allocate the disk blocks of a file that holds only zeros from `start` on.

    On a full disk this raises; writing through a memory map would kill the process instead.
    """
    size = path.stat().st_size
    with disk_full_as_error(), path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not every system and file system has it
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            file.seek(start)
            for at in range(start, size, _BLOCK):
                file.write(bytes(min(_BLOCK, size - at)))
