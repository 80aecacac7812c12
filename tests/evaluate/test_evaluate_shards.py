"""Shards of an evaluation: each trains its own students, and the figures are those of one run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cli import invoke
from cli_schema import check_output
from encode_world import make_tree
from evaluate_world import BLINK, figures
from object_stores import bucket, store_servers
from tiny_backbones import tiny_pack, tiny_sd

import d3pack
from d3pack.errors import UsageError
from d3pack.evaluate import EvalSettings, Evaluation, bench, evaluate, evaluate_shard, teacher
from d3pack.evaluate.baselines import AVIF_SHEET
from d3pack.evaluate.payload import candidates, pilots_of
from d3pack.students import train_student
from d3pack.system import ObjectPath, Shard, mirror

__all__ = ["bucket", "store_servers"]
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    pack = tiny_pack(tiny_sd(root / "backbone"), images=6, steps=1, guidance=1.0)
    ref = replace(pack.recipe.backbone, repo="org/tiny")  # its bytes are not sent
    d3pack.write(replace(pack, recipe=replace(pack.recipe, backbone=ref)), root / "pack.d3m")
    for split, count in (("train", 12), ("test", 5)):
        make_tree(root / "real" / split, count, pack.classes)
    return root


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(teacher, "SAMPLES", 200)


def arguments(world: Path, work: Path | str, **changes: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"baselines": ("random", "webp", "names"), "seeds": 2, **changes}
    settings = EvalSettings(backbone=str(world / "backbone"), **chosen)
    return {
        "pack": world / "pack.d3m",
        "real": world / "real",
        "settings": settings,
        "work": work,
        "protocol": BLINK,
    }


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    work = tmp_path_factory.mktemp("whole")
    return figures(evaluate(**arguments(world, work, sweep=("ipc=2",))))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_train_the_students_of_one_run(
    count: int,
    world: Path,
    whole: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = arguments(world, tmp_path / "work", sweep=("ipc=2",))
    trained = [evaluate_shard(**call, shard=Shard(n, count)) for n in range(count, 0, -1)]
    assert sum(trained) == 5 * 2  # pack, random, webp, names, the variant
    assert max(trained) - min(trained) <= 1
    assert not list((tmp_path / "work").glob("*.lock"))
    assert evaluate_shard(**call, shard=Shard(1, count)) == 0
    monkeypatch.setattr(bench, "train_student", None)  # nothing is left to train
    monkeypatch.setattr(bench.Bench, "decode_seconds", lambda *_: 0.0)
    assert figures(evaluate(**call)) == whole


def test_a_run_without_shard_trains_what_is_missing(
    world: Path, whole: tuple[str, str], tmp_path: Path
) -> None:
    call = arguments(world, tmp_path / "work", sweep=("ipc=2",))
    evaluate_shard(**call, shard=Shard(2, 3))
    (tmp_path / "work" / "shard-1-of-3.lock").touch()  # what a killed shard leaves
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("pack-*.json")}
    assert kept
    assert figures(evaluate(**call)) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.e2e
def test_shards_share_nothing_but_a_bucket(
    world: Path,
    whole: tuple[str, str],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second is lost after a student, and goes on elsewhere; the end trains nothing."""
    call = arguments(world, f"{bucket}/deep/x.eval", sweep=("ipc=2",))
    monkeypatch.setattr(mirror, "_BEAT_SECONDS", 0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert evaluate_shard(**call, shard=Shard(1, 2)) == 5
    real, done = train_student, list[int]()

    def lost(*args: Any, **more: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **more)

    monkeypatch.setattr(bench, "train_student", lost)
    with pytest.raises(KeyboardInterrupt):
        evaluate_shard(**call, shard=Shard(2, 2))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".d3pack")]
    monkeypatch.setattr(bench, "train_student", real)
    assert evaluate_shard(**call, shard=Shard(2, 2)) == 3
    work = ObjectPath(f"{bucket}/deep/x.eval")
    assert not [name for name in work.tree() if name.endswith(".lock")]
    monkeypatch.setattr(bench, "train_student", None)  # nothing is left to train
    monkeypatch.setattr(bench.Bench, "decode_seconds", lambda *_: 0.0)
    evaluation = evaluate(**call)
    assert evaluation.work == work
    assert figures(evaluation) == whole
    assert "evaluation.json" in work.tree()


def test_a_shard_runs_once_at_a_time_beside_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(world, tmp_path / "work", baselines=("random",), seeds=1)
    real, trained = train_student, list[int]()

    def watched(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(bench, "train_student", real)
        with pytest.raises(UsageError, match="another process trains shard 1/2"):
            evaluate_shard(**call, shard=Shard(1, 2))
        trained.append(evaluate_shard(**call, shard=Shard(2, 2)))
        return real(*args, **more)

    monkeypatch.setattr(bench, "train_student", watched)
    trained.append(evaluate_shard(**call, shard=Shard(1, 2)))
    assert trained == [1, 1]


def test_what_another_process_makes_is_waited_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher, pilots and students: the second run trains none of them."""
    names = ("random", "chosen")
    call = arguments(world, tmp_path / "work", baselines=names, seeds=1, teacher="train")
    real, notes, results = train_student, list[str](), list[Evaluation]()
    trainings: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        notes.append(event.get("text", ""))

    second = Thread(target=lambda: results.append(evaluate(**call, listeners=[listen])))

    def watched(*args: Any, **more: Any) -> Any:
        trainings.append(1)
        if len(trainings) == 1:
            second.start()
            while not any("waiting for another process" in note for note in notes):
                assert second.is_alive()
                time.sleep(0.01)
        return real(*args, **more)

    monkeypatch.setattr(bench, "train_student", watched)
    first = evaluate(**call)
    second.join(60)
    assert [figures(result) for result in results] == [figures(first)]
    monkeypatch.setattr(bench, "train_student", None)
    assert figures(evaluate(**call)) == figures(first)
    alone = {path.name for path in (tmp_path / "work").glob("*-seed0.json")}
    assert len(alone) == 3 + 2  # students, and the pilots of two sheets
    pilots = 2 * sum(pilots_of(len(candidates(AVIF_SHEET, first.facts["size"]))))
    assert len(trainings) == 3 + pilots


def test_a_stopped_evaluation_keeps_its_pilots(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(world, tmp_path / "work", baselines=("avif",), seeds=1)
    real, trainings = train_student, list[int]()

    def stopped(*args: Any, **more: Any) -> Any:
        if len(trainings) == 5:
            raise KeyboardInterrupt
        trainings.append(1)
        return real(*args, **more)

    def counted(*args: Any, **more: Any) -> Any:
        trainings.append(1)
        return real(*args, **more)

    monkeypatch.setattr(bench, "train_student", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**call)
    monkeypatch.setattr(bench, "train_student", counted)
    result = evaluate(**call)
    pilots = sum(pilots_of(len(candidates(AVIF_SHEET, result.facts["size"]))))
    assert len(trainings) == 2 + pilots
    unbroken = arguments(world, tmp_path / "other", baselines=("avif",), seeds=1)
    assert figures(evaluate(**unbroken)) == figures(result)


def test_a_teacher_is_that_of_the_work_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines have caches of their own, and might train other teachers."""
    call = arguments(world, tmp_path / "work", baselines=("none",), teacher="train", seeds=2)
    assert evaluate_shard(**call, shard=Shard(1, 2)) == 1
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "another machine"))
    assert evaluate_shard(**call, shard=Shard(2, 2)) == 1
    assert not list((tmp_path / "another machine").glob("teachers/*"))


SCRIPT = """
import sys
from pathlib import Path
from test_evaluate_shards import arguments, evaluate_shard, Shard
call = arguments(Path(sys.argv[1]), Path(sys.argv[2]), sweep=("ipc=2",))
print(evaluate_shard(**call, shard=Shard.parse(sys.argv[3])))
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_and_a_killed_one(
    world: Path, whole: tuple[str, str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    paths = [str(Path(__file__).parent), *sys.path]

    def start(shard: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(world), str(work), shard]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

    killed, other = start("1/2"), start("2/2")
    while killed.poll() is None and not list(work.glob("pack-*-seed0.json")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert other.communicate(timeout=300)[0] == "5\n"
    rest = start("1/2")
    assert int(rest.communicate(timeout=300)[0]) <= 4
    assert figures(evaluate(**arguments(world, work, sweep=("ipc=2",)))) == whole


def test_the_command_trains_a_share(world: Path, tmp_path: Path) -> None:
    words = ["eval", world / "pack.d3m", "--real", world / "real", "--work", tmp_path / "work"]
    more = ["--backbone", world / "backbone", "--baseline", "none", "--seeds", "1"]
    told = invoke(*words, *more, "--shard", "2/2", "--format", "json")
    assert check_output("eval --shard", told.stdout) == {"shard": "2/2", "trained": 0}
    assert not (tmp_path / "work" / "evaluation.json").exists()
    for text in ("3", "0/8", "9/8", "a/b"):
        bad = invoke(*words, *more, "--shard", text)
        assert bad.exit_code == 2
        assert bad.stderr.count("\n") == 1
        assert f"invalid --shard {text!r}: expected NUMBER/COUNT, as 3/8" in bad.stderr
