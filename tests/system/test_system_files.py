"""Files and folders: written completely or not at all; a full disk is always the same error."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from d3pack.errors import D3MError, NoSpaceError, NotFoundError, UsageError
from d3pack.system import (
    create_file,
    disk_full_as_error,
    files,
    remove_leftovers,
    replace_file,
    replace_folder,
    reserve,
    write_json,
    write_text,
    writing,
)
from d3pack.system.files import temporary_path

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
QUOTA = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
DEVICE = Path("/dev/full")


def raising(error: BaseException) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


# -- files ------------------------------------------------------------------------------------


@pytest.mark.posix
def test_a_file_and_its_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    real = os.fsync

    def fsync(fd: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(tmp_path / "x", b"data")
    assert flushed == [False, True]
    assert (tmp_path / "x").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    replace_file(tmp_path / "x", b"old")
    monkeypatch.setattr(os, step, raising(OSError(5, "Input/output error")))
    with pytest.raises(D3MError, match=r"cannot write .*x: Input/output error"):
        replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not DEVICE.exists(), reason="this system has no /dev/full")
def test_a_full_disk_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to(DEVICE)
    monkeypatch.setattr(files, "temporary_path", lambda path: tmp_path / "full")
    message = r"no space left to write x; free some and run the same"
    with pytest.raises(NoSpaceError, match=message), writing(tmp_path / "x") as temporary:
        temporary.write_bytes(b"1" * 10_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [FULL, QUOTA])
@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_full_disk_has_its_own_error_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: OSError
) -> None:
    monkeypatch.setattr(os, step, raising(error))
    writes: tuple[Callable[[], object], ...] = (
        lambda: replace_file(tmp_path / "x", b"1"),
        lambda: write_text(tmp_path / "x", "1"),
        lambda: write_json(tmp_path / "x", 1),
    )
    for write in writes:
        with pytest.raises(NoSpaceError, match="no space left to write x"):
            write()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_no_temporary(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


def test_writers_at_the_same_time_use_names_of_their_own(tmp_path: Path) -> None:
    """Several writers, one target: each result is complete, and one of theirs."""
    contents = [bytes([n]) * 50_000 for n in range(8)]

    def write(data: bytes) -> None:
        for _ in range(5):
            with writing(tmp_path / "x") as temporary:
                temporary.write_bytes(data)
            assert (tmp_path / "x").read_bytes() in contents

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.posix
def test_permissions_stay_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_places_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for name in ("", ".", "a\0b"):
        with pytest.raises(UsageError, match="is not the name of a file"):
            replace_file(name, b"")
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(UsageError, match="is not a regular file"):
            replace_file(path, b"")
    with pytest.raises(NotFoundError, match="missing is not a directory; create it first"):
        replace_file(tmp_path / "missing" / "x", b"")


def test_text_makes_its_folders_and_escapes_what_is_no_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b", "é \udcff")
    assert (tmp_path / "a" / "b").read_bytes() == "é \\udcff".encode()


def test_json_is_indented_and_sorted(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": [2]})
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'


@pytest.mark.parametrize("links", [True, False])
def test_the_first_creator_of_a_file_wins(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "missing"))
    for data in (b"first", b"second"):
        create_file(tmp_path / "file", data)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"
    with pytest.raises(FileNotFoundError):
        create_file(tmp_path / "missing" / "file", b"")


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "kept").touch()
    (tmp_path / "mine.part").mkdir()
    temporary_path(tmp_path / "deep" / "x").touch()
    (tmp_path / "x.part").touch()
    folder = temporary_path(tmp_path / "y")
    folder.mkdir()
    (folder / "z").touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["deep", "mine.part"]
    assert os.listdir(tmp_path / "deep") == ["kept"]


# -- folders ----------------------------------------------------------------------------------


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "deep" / "f") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_bytes(b"1")
        assert not (tmp_path / "deep" / "f").exists()
    assert (tmp_path / "deep" / "f" / "sub" / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path / "deep") == ["f"]


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").touch()
    with replace_folder(tmp_path / "f") as temporary:
        (temporary / "new").touch()
        assert os.listdir(tmp_path / "f") == ["old"]
    assert os.listdir(tmp_path / "f") == ["new"]
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_another_process_has_put_there_stays(tmp_path: Path, existed: bool) -> None:
    """The slower of two processes must not delete what the faster one's reader has open."""
    if existed:
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "old").touch()
    with replace_folder(tmp_path / "f") as slow:
        (slow / "slow").touch()
        with replace_folder(tmp_path / "f") as fast:
            (fast / "fast").touch()
        inode = (tmp_path / "f").stat().st_ino
    assert os.listdir(tmp_path / "f") == ["fast"]
    assert (tmp_path / "f").stat().st_ino == inode
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_put_there_at_the_last_moment_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    real = os.rename
    calls: list[Any] = []

    def rename(source: Path, target: Path) -> None:
        if not calls:  # between the look at the old folder and its move
            calls.append(target)
            shutil.rmtree(tmp_path / "f")
            (tmp_path / "f").mkdir()
            (tmp_path / "f" / "fast").touch()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with replace_folder(tmp_path / "f") as slow:
        (slow / "slow").touch()
    assert os.listdir(tmp_path / "f") == ["fast"]
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_folder_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").touch()
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "f"):
        raise KeyboardInterrupt
    with (
        pytest.raises(NoSpaceError, match="no space left to write f"),
        replace_folder(tmp_path / "f"),
    ):
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if target == tmp_path / "f" and not (Path(source) / "old").exists():
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), replace_folder(tmp_path / "f"):
        pass
    assert os.listdir(tmp_path / "f") == ["old"]
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UsageError, match="f is not a folder"), replace_folder(tmp_path / "f"):
        pass


def test_processes_that_make_the_same_folder_leave_a_complete_one(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from d3pack.system import replace_folder
for _ in range(20):
    with replace_folder(sys.argv[1]) as folder:
        for n in range(5):
            (folder / str(n)).write_text(sys.argv[2])
"""
    place = tmp_path / "f"
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(place), str(n)]) for n in range(3)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len({path.read_text() for path in place.iterdir()}) == 1
    assert len(list(place.iterdir())) == 5
    assert os.listdir(tmp_path) == ["f"]


# -- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        QUOTA,
        OSError(f"{os.strerror(errno.ENOSPC)}: 'x'"),
        OSError("100 requested and 40 written"),  # numpy
        SafetensorError("I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
        Exception(os.strerror(errno.EDQUOT)),  # tokenizers
    ],
)
def test_a_full_disk_is_known_in_every_library_s_words(error: Exception) -> None:
    with (
        pytest.raises(NoSpaceError, match="no space left on the disk; free some") as caught,
        disk_full_as_error(),
    ):
        raise error
    assert caught.value.code == "E_NO_SPACE"
    assert caught.value.__cause__ is error


def test_other_errors_stay_what_they_are() -> None:
    for error in (
        ValueError("x"),
        OSError(13, "denied"),
        SafetensorError("header too large"),
        D3MError("No space left on device"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as same, disk_full_as_error():
            raise error
        assert same.value is error


@pytest.mark.parametrize("fault", [AttributeError("posix_fallocate"), OSError(95, "not supported")])
def test_where_room_cannot_be_asked_for_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(1_000_000)
    monkeypatch.setattr(os, "posix_fallocate", raising(fault))
    monkeypatch.setattr(files, "_BLOCK", 1000)
    reserve(path, 4)
    assert path.read_bytes() == b"head" + bytes(999_996)
    assert path.stat().st_blocks * 512 >= 1_000_000


def test_reserving_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.zeros(9))
    monkeypatch.setattr(os, "posix_fallocate", raising(FULL))
    with pytest.raises(NoSpaceError, match="no space left on the disk"):
        reserve(tmp_path / "x.npy", 128)
