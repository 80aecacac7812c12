"""SIGKILL at any time, the same call again: the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from encode_server import Server
from encode_world import CLASSES, make_tree, save_classifier
from tiny_backbones import tiny_dit

pytestmark = [pytest.mark.heavy, pytest.mark.posix]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("resume"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> bytes:
    answer = server.run("undisturbed.d3m")
    assert "error" not in answer, answer
    return server.bytes_of("undisturbed.d3m")


KILLS = [
    ["step", "read for the teacher", 2],
    ["step", "train the teacher", 1],
    ["stage", "collages", 1],
    ["step", "collages", 2],
    ["step", "invert", 1],
    ["step", "invert", 3],
    ["step", "make and judge candidates", 2],
    ["step", "make and judge labels", 1],
    ["sheets", "", 1],
]


def test_killed_in_every_stage(server: Server, undisturbed: bytes) -> None:
    for kill in KILLS:
        answer = server.run("killed.d3m", kill_at=kill)
        assert answer["status"] == signal.SIGKILL, (kill, answer)
        assert not (server.folder / "killed.d3m").exists()
    answer = server.run("killed.d3m")
    assert "error" not in answer, answer
    assert server.bytes_of("killed.d3m") == undisturbed


def test_work_that_is_done_is_not_done_again(server: Server, undisturbed: bytes) -> None:
    server.run("skips.d3m", kill_at=["step", "make and judge labels", 1])
    answer = server.run("skips.d3m")
    stages = [stage for event, stage in answer["seen"] if event == "stage"]
    assert "train the teacher" not in stages
    assert ["step", "invert"] not in answer["seen"]
    assert server.bytes_of("skips.d3m") == undisturbed


def test_killed_while_photographs_are_coded(server: Server) -> None:
    changes = {"codes": 2, "code_steps": 3, "code_bits": 4}
    assert "error" not in server.run("codes.d3m", changes=changes)
    for kill in (["stage", "code photographs", 1], ["step", "code photographs", 2]):
        answer = server.run("cut.d3m", changes=changes, kill_at=kill)
        assert answer["status"] == signal.SIGKILL, (kill, answer)
    assert "error" not in server.run("cut.d3m", changes=changes)
    assert server.bytes_of("cut.d3m") == server.bytes_of("codes.d3m")


def test_killed_at_random_times(server: Server, undisturbed: bytes) -> None:
    deaths = 0
    for attempt in range(20):
        answer = server.run("random.d3m", kill_after=0.35 * 1.4**attempt)
        deaths += answer["status"] == signal.SIGKILL
        if answer["status"] != signal.SIGKILL:
            break
    assert "error" not in answer, answer
    assert deaths >= 1
    assert server.bytes_of("random.d3m") == undisturbed


def test_the_same_call_twice_gives_the_same_bytes(server: Server, undisturbed: bytes) -> None:
    answer = server.run("again.d3m")
    assert "error" not in answer, answer
    assert server.bytes_of("again.d3m") == undisturbed


def test_a_finished_run_is_recognised(server: Server, undisturbed: bytes) -> None:
    answer = server.run("undisturbed.d3m")
    assert {stage for _, stage in answer["seen"]} == {"", "look through the source"}
    assert server.bytes_of("undisturbed.d3m") == undisturbed


def test_killed_when_the_file_is_there(server: Server, undisturbed: bytes) -> None:
    answer = server.run("written.d3m", kill_at="written")
    assert answer["status"] == signal.SIGKILL
    assert server.bytes_of("written.d3m") == undisturbed
    answer = server.run("written.d3m")
    assert "error" not in answer, answer
    assert {stage for _, stage in answer["seen"]} == {"", "look through the source"}
    assert not (server.folder / "written.d3m.work" / "classes").exists()


def test_a_finished_run_that_lost_its_file_to_another(server: Server, undisturbed: bytes) -> None:
    server.run("lost.d3m")
    (server.folder / "lost.d3m").write_bytes(b"something of mine")
    assert "lost.d3m exists" in server.run("lost.d3m")["error"]


def test_another_seed_gives_another_pack(server: Server, undisturbed: bytes) -> None:
    answer = server.run("seed.d3m", changes={"seed": 1})
    assert "error" not in answer, answer
    assert server.bytes_of("seed.d3m") != undisturbed


def test_changed_options_and_sources_are_said(server: Server, undisturbed: bytes) -> None:
    server.run("changed.d3m", kill_at=["step", "collages", 2])
    answer = server.run("changed.d3m", changes={"lr": 0.05})
    assert "lr was 3.0 when this work began and is 0.05 now" in answer["error"]
    picture = server.source / "lemon" / "000.png"
    before = picture.read_bytes()
    picture.write_bytes(before + b"\0")
    answer = server.run("changed.d3m")
    picture.write_bytes(before)
    assert "the source has changed since this work began" in answer["error"]
    assert "use --restart (restart=True) to begin anew" in answer["error"]
    answer = server.run("changed.d3m")
    assert "error" not in answer, answer
    assert server.bytes_of("changed.d3m") == undisturbed


def test_another_teacher_is_said(server: Server) -> None:
    """Its directory is called as before: what lies in it decides."""
    path, table = server.folder / "teacher", server.folder / "map.json"
    names = {name: name for name in CLASSES}
    save_classifier(path, CLASSES)
    table.write_text(json.dumps(names))
    changes = {"teacher": str(path), "teacher_map": str(table)}
    server.run("judged.d3m", changes=changes, kill_at=["step", "collages", 2])
    weights = path / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    answer = server.run("judged.d3m", changes=changes)
    assert "the teacher has changed since this work began; put it back" in answer["error"]
    weights.write_bytes(before)
    table.write_text(json.dumps({**names, "lemon": "goldfish", "goldfish": "lemon"}))
    answer = server.run("judged.d3m", changes=changes)
    assert "the teacher map has changed since this work began" in answer["error"]
    table.write_text(json.dumps(names))
    answer = server.run("judged.d3m", changes=changes)
    assert "error" not in answer, answer


def test_other_threads_do_not_change_the_teacher(server: Server, undisturbed: bytes) -> None:
    server.run("threads.d3m", kill_at=["step", "collages", 2])
    answer = server.run("threads.d3m", threads=2)
    assert "error" not in answer, answer
    assert ["stage", "train the teacher"] not in answer["seen"]
    assert server.bytes_of("threads.d3m") == undisturbed


@pytest.mark.slow
def test_half_a_teacher_of_other_threads_is_none(server: Server, undisturbed: bytes) -> None:
    server.run("half.d3m", kill_at=["step", "train the teacher", 1], threads=2)
    answer = server.run("half.d3m")
    assert "error" not in answer, answer
    assert server.bytes_of("half.d3m") == undisturbed
    begun = [s for e, s in answer["seen"] if (e, s) == ("step", "train the teacher")]
    again = server.run("whole.d3m")["seen"]
    assert begun == [s for e, s in again if (e, s) == ("step", "train the teacher")]


@pytest.mark.parametrize("method", ["d3m", "minimax"])
def test_skipped_files_are_not_forgotten(server: Server, tmp_path: Path, method: str) -> None:
    root = make_tree(tmp_path / "source")
    (root / "lemon" / "bad.png").write_bytes(b"")
    job: dict[str, Any] = {"source": str(root)}
    kill = ["step", "collages", 3]
    if method == "minimax":
        dit = tmp_path / "dit"
        tiny_dit(dit)
        plain = {"candidates": None, "labels": None}
        job |= {
            "backbone": str(dit),
            "changes": {"method": method, "epochs": 1, **plain},
        }
        kill = ["stage", "tune the backbone", 1]
    name = f"skipped-{method}.d3m"
    answer = server.run(name, kill_at=kill, **job)
    assert answer["status"] == signal.SIGKILL, answer
    answer = server.run(name, on_error="fail", **job)
    assert "lemon/bad.png" in answer["error"]
    answer = server.run(name, **job)
    assert "error" not in answer, answer
    listed = (server.folder / f"{name}.work" / "skipped.txt").read_text()
    assert listed.startswith("lemon\tbad.png\t")
    assert listed.count("\n") == 1


def test_another_output_is_not_overwritten(server: Server) -> None:
    (server.folder / "mine.d3m").write_bytes(b"something of mine")
    answer = server.run("mine.d3m")
    assert "mine.d3m exists" in answer["error"]
    assert server.bytes_of("mine.d3m") == b"something of mine"
