"""Encodings, exports and evaluations by workers: the bytes of one run, whatever is lost on the way.

Each test starts Ray, which takes some seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from encode_world import make_tree, quick, settings_of
from object_stores import bucket, store_servers
from tiny_backbones import tiny_dit

from d3pack import read
from d3pack.decode import Decoder, export_by_workers, export_images
from d3pack.encode import EncodeSettings, encode
from d3pack.errors import UsageError
from d3pack.evaluate import EvalSettings, evaluate
from d3pack.hub import load
from d3pack.sources import open_source
from d3pack.students.protocols import QUICK, Intervals, Updates
from d3pack.system import ObjectPath, Workers

__all__ = ["bucket", "store_servers"]
ray: Any = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.usefixtures("long_pilot")]


BLINK = replace(
    QUICK, name="blink", batch=((1 << 60, 8),), length=Updates(4), tests=Intervals(parts=2)
)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of Ray find what this one does; afterwards there are none."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def world(home: Path) -> Path:
    tiny_dit(home / "dit")
    return home


def settings_by_name(world: Path, name: str) -> EncodeSettings:
    sd = str(world / "sd")
    if name == "d3m":
        return quick(sd, codes=2, code_steps=3, code_bits=4)
    if name == "many candidates":
        return quick(sd, candidates=128)
    if name == "codes":
        return settings_of(method="codes", backbone=sd, code_steps=3, code_bits=4)
    if name == "minimax":
        return quick(str(world / "dit"), method="minimax", epochs=1, search_images=0)
    return settings_of(
        method="classcond", size=(16, 16), guidance=1.5, model="tiny", search_images=12,
        images_per_class=2, candidates=2, teacher_samples=200, train_steps=6, group=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wholes(world: Path) -> Callable[[str], bytes]:
    """Packs of runs without workers, each made once."""

    @cache
    def whole(name: str) -> bytes:
        output = world / f"whole-{name}.d3m"
        encode(world / "source", output, settings_by_name(world, name))
        return output.read_bytes()

    return whole


@pytest.mark.parametrize("name", ["d3m", "codes", "minimax", "classcond"])
def test_the_number_of_workers_does_not_show(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes], name: str
) -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    for number in (1, 2, 4):
        output = tmp_path / f"{number}.d3m"
        encode(
            world / "source",
            output,
            settings_by_name(world, name),
            teachers=tmp_path / f"teachers-{number}",
            workers=Workers(devices=str(number)),
        )
        assert output.read_bytes() == wholes(name)


def kill_at(event_name: str, kill: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """A listener that kills something at the first event of a stage."""
    done: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("stage") == event_name and not done:
            done.append(1)
            kill()

    return listen


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("d3m", "train the teacher"),
        ("d3m", "invert"),
        ("many candidates", "make and judge candidates"),  # few are done before it is removed
    ],
)
def test_a_removed_machine_is_made_good(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes], name: str, stage: str
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    notes: list[dict[str, Any]] = []
    try:
        encode(
            world / "source",
            tmp_path / "x.d3m",
            settings_by_name(world, name),
            teachers=tmp_path / "teachers",
            workers=Workers(devices="2", shards=3),
            listeners=[kill_at(stage, lambda: cluster.remove_node(second)), notes.append],
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert any("has lost its worker" in event.get("text", "") for event in notes)
    assert (tmp_path / "x.d3m").read_bytes() == wholes(name)


PROGRAM = """
import sys
from pathlib import Path
from encode_world import quick
from d3pack.encode import encode
from d3pack.students.protocols import QUICK, Intervals, Updates
from d3pack.system import Workers
world, output, teachers = sys.argv[1:]
settings = quick(world + "/sd", codes=2, code_steps=3, code_bits=4)
encode(world + "/source", output, settings, teachers=Path(teachers),
       workers=Workers(devices="2"), listeners=[lambda event: print(event, flush=True)])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_driver_goes_on_when_it_is_run_again(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes], how: int
) -> None:
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(world),
        str(tmp_path / "x.d3m"),
        str(tmp_path / "t"),
    ]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    first = start()
    assert first.stdout is not None
    for line in first.stdout:
        if "'step'" in line and "'invert'" in line:
            first.send_signal(how)
            break
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert not (tmp_path / "x.d3m").exists()
    again = start()
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0
    assert "train the teacher" not in said  # it was there
    assert (tmp_path / "x.d3m").read_bytes() == wholes("d3m")


def test_exports_lose_and_double_no_image(world: Path, tmp_path: Path, wholes: Any) -> None:
    wholes("d3m")
    pack = read(world / "whole-d3m.d3m")
    export_images(Decoder(pack, device="cpu", path=world / "sd"), tmp_path / "one")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    pids: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not pids:
            (pid, *_) = worker_pids()
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)

    report, describe = export_by_workers(
        pack,
        tmp_path / "many",
        Workers(devices="2"),
        decoder={"device": "cpu", "path": world / "sd"},
        listeners=[kill],
    )
    assert pids
    assert report.images == len(pack)
    assert describe["numerics"] == "exact"
    assert content(tmp_path / "many") == content(tmp_path / "one")


def worker_pids() -> list[int]:
    """Processes of Ray in which our actors live."""
    children = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    rows = [line.split(None, 1) for line in children.stdout.splitlines()]
    return [int(pid) for pid, name in rows if name.startswith("ray::_Worker")]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_evaluations_train_each_student_once(world: Path, tmp_path: Path, wholes: Any) -> None:
    wholes("d3m")
    for split, count in (("train", 12), ("test", 5)):
        make_tree(tmp_path / "real" / split, count)
    settings = EvalSettings(
        backbone=str(world / "sd"), baselines=("random", "webp"), seeds=2, device="cpu"
    )
    call: dict[str, Any] = {
        "pack": world / "whole-d3m.d3m",
        "real": tmp_path / "real",
        "settings": settings,
        "protocol": BLINK,
    }  # fmt: skip
    one = evaluate(**call, work=tmp_path / "one")
    many = evaluate(**call, work=tmp_path / "many", workers=Workers(devices="2"))
    assert [figures(result.to_json()) for result in many.results] == [
        figures(result.to_json()) for result in one.results
    ]
    assert (tmp_path / "many" / "evaluation.json").exists()


def test_evaluations_share_nothing_but_a_bucket(
    world: Path, tmp_path: Path, wholes: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes("d3m")
    for split, count in (("train", 12), ("test", 5)):
        make_tree(tmp_path / "real" / split, count)
    for path in (tmp_path / "real").rglob("*.png"):
        ObjectPath(f"{bucket}/{path.relative_to(tmp_path).as_posix()}").upload(path)
    settings = EvalSettings(
        backbone=str(world / "sd"), baselines=("random",), seeds=2, device="cpu", teacher="train"
    )
    call: dict[str, Any] = {
        "pack": world / "whole-d3m.d3m",
        "real": f"{bucket}/real",
        "settings": settings,
        "protocol": BLINK,
    }
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    many = evaluate(**call, work=f"{bucket}/x.eval", workers=Workers(devices="2"))
    one = evaluate(**call, work=tmp_path / "one")
    assert [figures(result.to_json()) for result in many.results] == [
        figures(result.to_json()) for result in one.results
    ]
    there = ObjectPath(f"{bucket}/x.eval").tree()
    assert "evaluation.json" in there
    assert sum(name.endswith("/teacher.safetensors") for name in there) == 1
    assert not list(Path().iterdir())


def figures(row: dict[str, Any]) -> str:
    """A row without seconds, which were measured."""
    text = json.dumps(row, sort_keys=True)
    assert '"last"' in text
    return re.sub(r'"(\w+_)?seconds": [^,}\]]+', "", text)


def test_storage_that_fails_now_and_then_does_not_show(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes]
) -> None:
    """Something lies in the place of a part until it is met."""
    part = tmp_path / "x.d3m.parts" / "2-of-3"
    part.parent.mkdir()
    part.touch()
    met: list[str] = []

    def clear(event: dict[str, Any]) -> None:
        if "shard 2/3 is tried again" in event.get("text", ""):
            met.append(event["text"])
            part.unlink()

    encode(
        world / "source",
        tmp_path / "x.d3m",
        settings_by_name(world, "codes"),
        workers=Workers(devices="1", shards=3),
        listeners=[clear],
    )
    assert len(met) == 1
    assert (tmp_path / "x.d3m").read_bytes() == wholes("codes")


@pytest.mark.parametrize("name", ["codes", "d3m"])
def test_workers_share_nothing_but_a_bucket(
    world: Path, tmp_path: Path, bucket: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, parts, pack and export are objects; a worker is lost on the way."""
    for path in (world / "source").rglob("*.png"):
        ObjectPath(f"{bucket}/{path.relative_to(world).as_posix()}").upload(path)
    source, settings = f"{bucket}/source", settings_by_name(world, name)
    encode(source, tmp_path / "one.d3m", settings)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lost: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["stage"] == "code photographs" and not lost:
            lost.extend(worker_pids()[:1])
            os.kill(lost[0], signal.SIGKILL)

    encode(
        source,
        f"{bucket}/x.d3m",
        settings,
        teachers=tmp_path / "teachers",
        workers=Workers(devices="2"),
        listeners=[kill],
    )
    assert lost
    assert ObjectPath(f"{bucket}/x.d3m").read_bytes() == (tmp_path / "one.d3m").read_bytes()
    parts = ObjectPath(f"{bucket}/x.d3m.parts").tree()
    assert {part.partition("/")[0] for part in parts} == {"1-of-3", "2-of-3", "3-of-3"}
    assert not list(Path().iterdir())
    pack = load(f"{bucket}/x.d3m")
    how: dict[str, Any] = {"device": "cpu", "path": world / "sd"}
    export_images(Decoder(pack, **how), tmp_path / "export")
    export_by_workers(pack, ObjectPath(f"{bucket}/export"), Workers(devices="2"), decoder=how)
    exported = ObjectPath(f"{bucket}/export")
    assert {name: (exported / name).read_bytes() for name in exported.tree()} == content(
        tmp_path / "export"
    )


def test_sources_without_an_address_are_refused(world: Path, tmp_path: Path) -> None:
    source = open_source(world / "source")
    source.opened_by = None
    with pytest.raises(UsageError, match="workers cannot open this source"):
        encode(source, tmp_path / "x.d3m", workers=Workers(devices="1"))
