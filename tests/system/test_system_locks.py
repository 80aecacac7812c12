"""Locks: between processes, between threads of one, shared and exclusive."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d3pack.system import exclusive, lock, locked, try_lock_byte, unlock_byte
from d3pack.system import locks as locks_module

HOLD = """
import sys
from d3pack.system import lock
with lock(sys.argv[1], shared=sys.argv[2] == "shared"):
    print("locked", flush=True)
    sys.stdin.read()
"""

HOLD_BYTE = """
import sys
from d3pack.system import try_lock_byte
with open(sys.argv[1], "r+b") as file:
    assert try_lock_byte(file.fileno(), 1 << 40)
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path, kind: str = "exclusive") -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock until its input ends."""
    script = HOLD_BYTE if kind == "byte" else HOLD
    command = [sys.executable, "-c", script, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process


def test_an_exclusive_lock_keeps_everybody_out(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock"):
        for shared in (False, True):
            with pytest.raises(BlockingIOError, match="the file is locked"):
                lock(tmp_path / "lock", shared=shared)
    lock(tmp_path / "lock").close()


def test_shared_locks_go_together_and_keep_exclusive_ones_out(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock", "shared"):
        with lock(tmp_path / "lock", shared=True) as mine:
            assert mine.held
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "lock")
    lock(tmp_path / "lock").close()


def test_an_exclusive_file_is_there_only_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path):
        with pytest.raises(BlockingIOError), exclusive(path):
            pass
        assert path.exists()
    assert not path.exists()
    path.touch()  # of a killed process
    with exclusive(path):
        pass
    assert not path.exists()


def test_an_exclusive_file_is_not_the_one_that_was_removed(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(50):
            with exclusive(path, wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)  # lets the others open the file that goes away
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not path.exists()


@pytest.mark.e2e
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as process:
        process.kill()
        process.wait()
        with lock(tmp_path / "lock", wait=True) as mine:
            assert mine.held


def test_waiting_ends_when_the_other_process_does(tmp_path: Path) -> None:
    wait = "import sys; from d3pack.system import lock; lock(sys.argv[1], wait=True); print('in')"
    with lock(tmp_path / "lock"):
        command = [sys.executable, "-c", wait, str(tmp_path / "lock")]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.communicate(timeout=1)
    assert waiting.communicate(timeout=60)[0].strip() == b"in"


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    first = lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        lock(tmp_path / "lock")
    first.close()
    first.close()
    with lock(tmp_path / "lock") as second:
        assert os.fstat(second.fileno()).st_ino == (tmp_path / "lock").stat().st_ino


@pytest.mark.posix
def test_a_forked_child_that_closes_does_not_unlock_its_parent(tmp_path: Path) -> None:
    with lock(tmp_path / "lock") as mine:
        if (child := os.fork()) == 0:
            mine.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "lock")


def test_a_started_program_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path / "lock") as mine:
        assert not os.get_inheritable(mine.fileno())


def test_a_missing_file_is_made_only_if_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "lock", create=False)
    assert not (tmp_path / "lock").exists()
    lock(tmp_path / "lock").close()
    lock(tmp_path / "lock", create=False).close()


def test_a_read_only_file_can_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    real = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    with lock(tmp_path / "lock", shared=True) as mine:
        assert mine.held
    with pytest.raises(PermissionError):
        lock(tmp_path / "lock")


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock(tmp_path / "lock") as mine:
        assert not mine.held


def test_an_open_file_is_locked_for_a_while(tmp_path: Path) -> None:
    with open(tmp_path / "index", "w+b") as file:
        with locked(file.fileno()), pytest.raises(BlockingIOError):
            lock(tmp_path / "index")
        lock(tmp_path / "index").close()
        with locked(file.fileno(), shared=True):
            lock(tmp_path / "index", shared=True).close()
    assert locks_module.Lock(-1, held=False).fileno() == -1


@pytest.mark.e2e
def test_a_byte_is_locked_alone_and_freed_when_its_holder_is_killed(tmp_path: Path) -> None:
    path, byte = tmp_path / "claims", 1 << 40
    path.touch()
    with open(path, "r+b") as file:
        with held_elsewhere(path, "byte") as process:
            assert not try_lock_byte(file.fileno(), byte)
            assert try_lock_byte(file.fileno(), byte + 1)
            process.kill()
            process.wait()
            assert try_lock_byte(file.fileno(), byte)
        unlock_byte(file.fileno(), byte)
        with held_elsewhere(path, "byte"):
            assert not try_lock_byte(file.fileno(), byte)


def test_bytes_are_free_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, position: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks_module, "_lock_byte", refuse)
    monkeypatch.setattr(locks_module, "_unlock_byte", refuse)
    with open(tmp_path / "claims", "wb") as file:
        assert try_lock_byte(file.fileno(), 3)
        unlock_byte(file.fileno(), 3)
