"""The journal: what was done is not done again, and nothing half-written counts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d3pack.errors import NoSpaceError, UsageError
from d3pack.system import locks
from d3pack.system.files import temporary_path
from d3pack.system.journal import Checkpoint, Journal, JournalError


@contextmanager
def closing_journal(folder: Path) -> Iterator[Journal]:
    journal = Journal(folder, {})
    yield journal
    journal.close()


def test_journal_remembers(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {"source": "abc"})
    first.record("one", {"a": [1, 2]})
    first.save("deep/er", {"x": np.arange(6).reshape(2, 3)}, {"note": "é"})
    first.close()
    second = Journal(tmp_path / "w", {"source": "abc"})
    assert second["one"] == {"a": [1, 2]}
    found = second.load("deep/er")
    assert found is not None
    assert np.array_equal(found[0]["x"], np.arange(6).reshape(2, 3))
    assert found[1] == {"note": "é"}
    assert second.load("other") is None
    second.close()


def test_half_written_files_are_forgotten(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {})
    first.path("classes/000001.safetensors.part").write_bytes(b"half")
    first.close()
    second = Journal(tmp_path / "w", {})
    assert second.load("classes/000001") is None
    assert not list((tmp_path / "w").glob("**/*.part"))
    second.close()


def test_half_written_folders_are_forgotten(tmp_path: Path) -> None:
    with closing_journal(tmp_path / "w") as first:
        first.record("a", 1)
        (first.path("vae") / "x").parent.mkdir()
        left = temporary_path(first.path("vae/x"))
        (left / "deep").mkdir(parents=True)
        (left / "deep" / "file").touch()
    with closing_journal(tmp_path / "w") as second:
        assert second["a"] == 1
        assert (tmp_path / "w" / "vae").is_dir()
        assert not left.exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {})
    with pytest.raises(JournalError, match="another process works in w"):
        Journal(tmp_path / "w", {})
    first.close()
    Journal(tmp_path / "w", {}).close()


def test_restart_forgets(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {"source": "abc"})
    first.save("classes/000000", {"x": np.zeros(2)}, {})
    first.close()
    with pytest.raises(UsageError, match=r"the source has changed.* delete w to begin anew"):
        Journal(tmp_path / "w", {"source": "xyz"})
    second = Journal(tmp_path / "w", {"source": "xyz"}, restart=True)
    assert second.load("classes/000000") is None
    second.close()


@pytest.mark.parametrize("restart", [False, True])
def test_files_of_another_origin_stay(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "w" / "photos").mkdir(parents=True)
    (tmp_path / "w" / "notes.part").write_text("mine")
    with pytest.raises(JournalError, match="w holds files of another origin; move them away"):
        Journal(tmp_path / "w", {}, restart=restart)
    assert sorted(os.listdir(tmp_path / "w")) == ["notes.part", "photos"]


def test_a_restart_that_is_killed_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Journal(tmp_path / "w", {})
    first.save("classes/000000", {"x": np.zeros(2)}, {})
    first.record("one", 1)
    first.close()

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path / "w", {}, restart=True)
    monkeypatch.undo()
    Journal(tmp_path / "w", {}, restart=True).close()


def test_nothing_done_is_nothing_lost(tmp_path: Path) -> None:
    """A run that failed at once may be run again with mended options."""
    Journal(tmp_path / "w", {"source": "abc", "option teacher": "typo"}).close()
    Journal(tmp_path / "w", {"source": "abc", "option teacher": "right"}).close()


@pytest.mark.parametrize(
    ("name", "was", "now", "said"),
    [
        ("images_per_class", 2, 10, "images_per_class was 2 when this work began and is 10 now"),
        ("codec", None, "i8", 'codec was not given when this work began and is "i8" now'),
        ("extra", {}, {"lr": 1}, 'extra was {} when this work began and is {"lr": 1} now'),
    ],
)
def test_a_setting_that_differs_from_the_first_run_is_named(
    tmp_path: Path, name: str, was: Any, now: Any, said: str
) -> None:
    first = Journal(tmp_path / "w", {name: was})
    first.record("one", 1)
    first.close()
    with pytest.raises(UsageError) as error:
        Journal(tmp_path / "w", {name: now})
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9, "key": {}, "facts": {}}'])
def test_a_damaged_journal(tmp_path: Path, text: str) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "journal.json").write_text(text)
    with pytest.raises(JournalError, match="delete w to begin anew"):
        Journal(tmp_path / "w", {})


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_damaged_arrays(tmp_path: Path, keep: int) -> None:
    journal = Journal(tmp_path / "w", {})
    journal.save("a", {"x": np.zeros(20)}, {})
    path = tmp_path / "w" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(JournalError, match="damaged"):
        journal.load("a")
    journal.close()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "w", {})
    journal.record("x", "old")
    before = sorted(os.listdir(tmp_path / "w"))

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(JournalError, match=r"cannot write journal\.json: Input/output error"):
        journal.record("x", "new")
    monkeypatch.undo()
    journal.close()
    again = Journal(tmp_path / "w", {})
    assert again["x"] == "old"
    assert sorted(os.listdir(tmp_path / "w")) == before
    again.close()


def test_checkpoints_take_a_tenth_of_the_time_where_saving_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], list[float]()
    with closing_journal(tmp_path / "w") as journal:
        monkeypatch.setattr("time.monotonic", lambda: now[0])

        def slow(*_: Any) -> None:
            saved.append(now[0])
            now[0] += 3.0

        monkeypatch.setattr(journal, "save", slow)
        checkpoint = Checkpoint(journal, "state")
        while now[0] < 80:
            now[0] += 1.0
            checkpoint.save({})
        monkeypatch.undo()
    assert saved == [5.0, 38.0, 71.0]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "w", {})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", raising(full))
    with pytest.raises(NoSpaceError, match=r"no space left to write a\.safetensors; free some"):
        journal.save("a", {"x": np.zeros(3)}, {})
    journal.close()


def raising(error: Exception) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def test_a_journal_without_locks_keeps_temporaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no locks, another process may be at work here."""
    with closing_journal(tmp_path / "w") as first:
        first.record("a", 1)
    (tmp_path / "w" / "journal.json.part").touch()
    monkeypatch.setattr(locks, "_acquire", lambda *_, **__: False)
    Journal(tmp_path / "w", {}).close()
    assert (tmp_path / "w" / "journal.json.part").exists()


def test_two_journals_in_two_processes(tmp_path: Path) -> None:
    """The second is refused while the first lives, and let in when it was killed."""
    program = (
        "import sys, time; from pathlib import Path; from d3pack.system import Journal;"
        "j = Journal(Path(sys.argv[1]), {}); j.record('a', 1); print('ready', flush=True);"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "w")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"ready\n"
        with pytest.raises(JournalError, match="another process works in w"):
            Journal(tmp_path / "w", {})
        first.kill()
    with closing_journal(tmp_path / "w") as second:
        assert second["a"] == 1


def test_a_checkpoint_is_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with closing_journal(tmp_path / "w") as journal:
        checkpoint = Checkpoint(journal, "state")
        assert checkpoint.load() is None
        for at, expected in ((1.0, None), (6.0, 6.0), (8.0, 6.0)):
            now[0] = at
            checkpoint.save({"x": np.array([at])})
            state = checkpoint.load()
            assert (None if state is None else state["x"].item()) == expected
        checkpoint.save({"x": np.array([9.0])}, last=True)
        state = checkpoint.load()
        assert state is not None
        assert state["x"] == 9.0
