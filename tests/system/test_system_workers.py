"""Workers: what they report, and what is done where they fail, wait, or are lost."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_work import UNITS, Toy

from d3pack.errors import D3MError, SourceError, UsageError
from d3pack.system import Joined, SettingError, Workers, run_work


@pytest.mark.parametrize("devices", ["0", "-1", "some", "1.5"])
def test_devices_are_all_or_a_number(devices: str) -> None:
    with pytest.raises(SettingError, match="expected all or their number"):
        Workers(devices=devices)


def test_shards_are_for_workers() -> None:
    assert not Workers().wanted
    assert Workers(ray="auto").wanted
    assert Workers(devices="4").number == 4
    with pytest.raises(UsageError, match="shards= are for workers"):
        Workers(shards=8)


def test_errors_of_settings_travel() -> None:
    error = pickle.loads(pickle.dumps(SettingError("devices", 3, "all")))
    assert str(error) == "[E_USAGE] invalid devices 3: expected all"


def joined() -> tuple[Joined, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return Joined([events.append]), events


def test_parts_of_a_stage_are_added_up() -> None:
    joint, events = joined()
    for shard in ("1/2", "2/2"):
        joint.listen({"event": "stage", "stage": "s", "total": 10, "unit": "u", "shard": shard})
    for shard, done in (("1/2", 3), ("2/2", 4), ("1/2", 10)):
        joint.listen({"event": "step", "stage": "s", "done": done, "total": 10, "shard": shard})
    joint.listen({"event": "stage-done", "stage": "s", "seconds": 1, "shard": "1/2"})
    steps = [(e["done"], e["total"]) for e in events if e["event"] == "step"]
    assert steps == [(3, 20), (7, 20), (14, 20)]
    assert [e["event"] for e in events] == ["stage", "step", "step", "step"]
    joint.listen({"event": "left", "shard": "2/2"})
    assert events[-1]["event"] == "stage-done"


def test_a_stage_that_all_count_together_has_one_total() -> None:
    joint, events = joined()

    def begin(shard: str, done: int) -> None:
        joint.listen({
            "event": "stage", "stage": "s", "total": 10, "unit": "u", "done": done, "shard": shard
        })  # fmt: skip

    def step(shard: str, done: int) -> tuple[int, int]:
        joint.listen({"event": "step", "stage": "s", "done": done, "total": 10, "shard": shard})
        return events[-1]["done"], events[-1]["total"]

    begin("1/2", 2)
    begin("2/2", 2)
    assert step("1/2", 3) == (3, 10)
    assert step("2/2", 3) == (4, 10)
    begin("1/2", 4)  # again, after it has waited
    assert step("1/2", 5) == (5, 10)


def test_workers_say_the_same_once() -> None:
    joint, events = joined()
    for shard in ("1/2", "2/2"):
        joint.listen({"event": "plan", "lines": ["3 classes"], "shard": shard})
        joint.listen({"event": "note", "text": "good", "shard": shard})
    assert [e["event"] for e in events] == ["plan", "note"]


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
    assert not ray.is_initialized()
    if importlib.import_module("ray._private.services").find_gcs_addresses():
        pytest.skip("another program on this machine has a cluster, which would be found")
    with pytest.raises(UsageError, match="there is no Ray cluster at auto"):
        run_work(Toy(tmp_path), Workers(ray="auto"))


@pytest.fixture(scope="class")
def local() -> Iterator[None]:
    """One Ray for all tests of a class; its workers find the helpers."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def toy(folder: Path, *events: Any, **changes: Any) -> Any:
    return run_work(Toy(folder), Workers(devices="2", **changes), events, device="cpu")


@pytest.mark.e2e
@pytest.mark.usefixtures("local")
class TestOnRay:
    def test_shards_are_done_once(self, tmp_path: Path) -> None:
        events: list[dict[str, Any]] = []
        assert toy(tmp_path, events.append)
        assert {f"unit-{unit}" for unit in range(UNITS)} <= {p.name for p in tmp_path.iterdir()}
        assert not list(tmp_path.glob(".d3pack-*"))
        steps = [event for event in events if event["event"] == "step"]
        assert (steps[-1]["done"], steps[-1]["total"]) == (UNITS, UNITS)
        assert {"event": "note", "text": "put together", "shard": "end"} in events

    def test_a_lost_worker_is_replaced(self, tmp_path: Path) -> None:
        events: list[dict[str, Any]] = []
        (tmp_path / "die-2").write_text("2")
        assert toy(tmp_path, events.append)
        notes = [event["text"] for event in events if event["event"] == "note"]
        assert sum("shard 2/8 has lost its worker" in note for note in notes) == 2

    @pytest.mark.slow
    def test_a_shard_that_waits_goes_on_when_another_ends_a_stage(self, tmp_path: Path) -> None:
        """Not only when that other shard is done, nor after a pause that gets longer."""
        (tmp_path / "slow-1").write_text("8")
        assert toy(tmp_path, shards=2)
        last, waited = (tmp_path / name for name in (f"unit-{UNITS - 2}", "shard-2"))
        assert waited.stat().st_mtime - last.stat().st_mtime < 4

    @pytest.mark.slow
    def test_failing_storage_is_tried_again(self, tmp_path: Path) -> None:
        events: list[dict[str, Any]] = []
        (tmp_path / "fail-3").write_text("2")
        assert toy(tmp_path, events.append)
        notes = [event["text"] for event in events if event["event"] == "note"]
        assert sum("shard 3/8 is tried again" in note for note in notes) == 2

    @pytest.mark.slow
    def test_other_errors_end_the_run_as_they_are(self, tmp_path: Path) -> None:
        (tmp_path / "bad-4").touch()
        with pytest.raises(SourceError, match="no image can be read; look at them"):
            toy(tmp_path)
        (tmp_path / "bad-4").unlink()
        assert toy(tmp_path)  # the same call goes on

    @pytest.mark.slow
    def test_a_shard_that_kills_its_workers_ends_the_run(self, tmp_path: Path) -> None:
        (tmp_path / "die-1").write_text("99")
        with pytest.raises(D3MError, match="shard 1/3 has lost its worker 6 times"):
            toy(tmp_path, shards=3)
