"""Locks between processes, on files: fcntl on POSIX, LockFileEx on Windows.

A lock belongs to the open file. A second `lock` of the same file excludes the first one's holder
even within one process; a forked child shares its parent's lock, which ends when both have closed
it or ended. Locks are advisory: they keep out only who asks for them.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Lock:
    """A lock that is held until `close`, or until the process ends."""

    def __init__(self, fd: int, held: bool) -> None:
        self._fd = fd
        self.held = held
        """False where the file system has no locks, so that nobody is kept out."""

    def fileno(self) -> int:
        """Return the descriptor of the locked file."""
        return self._fd

    def close(self) -> None:
        """Release the lock. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # no explicit unlock: that would end the lock of a forked parent, too

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(
    path: str | os.PathLike[str], *, shared: bool = False, wait: bool = False, create: bool = True
) -> Lock:
    """Open a file and lock it.

    Args:
        path: the file; it is created where it is missing.
        shared: allow other shared locks; a file that can only be read will do.
        wait: wait until the lock is free instead of raising.
        create: False to raise `FileNotFoundError` where the file is missing.

    Raises:
        BlockingIOError: another process, or another `lock` in this one, holds it.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)  # Python closes it on exec
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if not shared or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fd = os.open(path, os.O_RDONLY)
    try:
        return Lock(fd, _acquire(fd, shared=shared, wait=wait))
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def exclusive(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file that exists only while somebody holds it.

    Args:
        path: the file; killed processes leave it, which disturbs nobody.
        wait: wait until the lock is free instead of raising.

    Raises:
        BlockingIOError: another process, or another lock in this one, holds it.
        OSError: the file cannot be opened.
    """
    held = lock(path, wait=wait)
    while not _is_at(held, path):  # its last holder removed it
        held.close()
        held = lock(path, wait=wait)
    with held:
        try:
            yield
        finally:
            with suppress(OSError):  # while it is held: nobody else can hold another file there
                os.unlink(path)


def _is_at(held: Lock, path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(held.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(fd: int, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file that is open already; waits for it."""
    held = _acquire(fd, shared=shared, wait=True)
    try:
        yield
    finally:
        if held:
            _release(fd)


def try_lock_byte(fd: int, position: int) -> bool:
    """Lock one byte of a file that is open for writing; return False if somebody else holds it.

    The byte need not exist. The lock lasts until `unlock_byte`, or until the file is closed. Where
    the file system has no such locks, everybody gets them.
    """
    try:
        _lock_byte(fd, position)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def unlock_byte(fd: int, position: int) -> None:
    """Release the lock of a byte."""
    with suppress(OSError):
        _unlock_byte(fd, position)


if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _SHARED, _EXCLUSIVE, _AT_ONCE = 0, 2, 1
    _TAKEN = (33, 997)  # ERROR_LOCK_VIOLATION, ERROR_IO_PENDING

    class _Overlapped(ctypes.Structure):
        _fields_ = (
            ("Internal", ctypes.c_void_p),
            ("InternalHigh", ctypes.c_void_p),
            ("Offset", wintypes.DWORD),
            ("OffsetHigh", wintypes.DWORD),
            ("hEvent", wintypes.HANDLE),
        )

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)

    # a byte far behind the contents: a lock on Windows also forbids to read what it covers
    _WHOLE = 0x40000000 << 32

    def _byte(position: int) -> _Overlapped:
        return _Overlapped(Offset=position & 0xFFFFFFFF, OffsetHigh=position >> 32)

    def _acquire(fd: int, *, shared: bool, wait: bool, position: int = _WHOLE) -> bool:
        handle = wintypes.HANDLE(msvcrt.get_osfhandle(fd))
        flags = (_SHARED if shared else _EXCLUSIVE) | (0 if wait else _AT_ONCE)
        if _kernel32.LockFileEx(handle, flags, 0, 1, 0, ctypes.byref(_byte(position))):
            return True
        if ctypes.get_last_error() in _TAKEN:
            raise BlockingIOError(errno.EAGAIN, "the file is locked")
        return False

    def _release(fd: int, position: int = _WHOLE) -> None:
        handle = wintypes.HANDLE(msvcrt.get_osfhandle(fd))
        _kernel32.UnlockFileEx(handle, 0, 1, 0, ctypes.byref(_byte(position)))

    def _lock_byte(fd: int, position: int) -> None:
        _acquire(fd, shared=False, wait=False, position=position)

    _unlock_byte = _release

else:
    import fcntl

    def _acquire(fd: int, *, shared: bool, wait: bool) -> bool:
        """Lock an open file; False where the file system has no locks."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: some network file systems
                raise BlockingIOError(errno.EAGAIN, "the file is locked") from None
            return False
        return True

    def _release(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def _set(fd: int, kind: int, position: int) -> None:
        """Set the lock of a byte: of the open file on Linux, elsewhere of the process."""
        if sys.platform == "linux" and sys.maxsize > 1 << 32:
            flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, position, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)
        else:
            free = kind == fcntl.F_UNLCK
            fcntl.lockf(fd, fcntl.LOCK_UN if free else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)

    def _lock_byte(fd: int, position: int) -> None:
        _set(fd, fcntl.F_WRLCK, position)

    def _unlock_byte(fd: int, position: int) -> None:
        _set(fd, fcntl.F_UNLCK, position)
