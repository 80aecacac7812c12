"""Shards that share nothing but a bucket: the pack of a run on one disk.

Each shard runs in an empty directory, with teachers of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from encode_world import make_tree, quick, settings_of
from object_stores import any_bucket, bucket, store_servers
from tiny_backbones import tiny_dit

from d3pack.encode import EncodeSettings, encode, encode_shard, merge
from d3pack.encode.methods.d3m import inversion
from d3pack.errors import UsageError
from d3pack.system import ObjectPath, Shard, WaitingError, mirror

__all__ = ["any_bucket", "bucket", "store_servers"]
pytestmark = [pytest.mark.e2e, pytest.mark.heavy]


@pytest.fixture(autouse=True)
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_BEAT_SECONDS", 0.5)
    monkeypatch.setattr(mirror, "_DEAD_SECONDS", 5.0)


def settings_by_name(home: Path, name: str) -> EncodeSettings:
    sd = str(home / "sd")
    if name == "codes":
        return settings_of(method="codes", backbone=sd, code_steps=3, code_bits=4)
    if name == "classcond":
        return settings_of(
            method="classcond", size=(16, 16), guidance=1.5, model="tiny", search_images=12,
            images_per_class=2, candidates=2, teacher_samples=200, train_steps=6, group=4,
        )  # fmt: skip
    if name == "minimax":
        if not (home / "dit").exists():
            tiny_dit(home / "dit")
        return quick(str(home / "dit"), method="minimax", epochs=1, search_images=0)
    return quick(sd, codes=2, code_steps=3, code_bits=4)


@pytest.fixture(scope="module")
def wholes(home: Path) -> Callable[[str], bytes]:
    """Packs of runs on one disk, each made once."""

    @cache
    def whole(name: str) -> bytes:
        output = home / f"{name}.d3m"
        encode(home / "source", output, settings_by_name(home, name))
        return output.read_bytes()

    return whole


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Path]]:
    """Move to an empty directory and return where teachers are kept in it."""

    def start() -> dict[str, Path]:
        folder = tmp_path / "machine"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
        return {"teachers": folder / "teachers"}

    return start


def in_turn(
    home: Path, output: str, settings: EncodeSettings, count: int, machine: Any, **more: Any
) -> None:
    """Run all shards one after another, each as far as it comes and each time elsewhere."""
    left = [Shard(number, count) for number in range(1, count + 1)]
    for _ in range(30):
        for shard in list(left):
            try:
                encode_shard(home / "source", output, shard, settings, **machine(), **more)
            except WaitingError:
                continue
            left.remove(shard)
        if not left:
            return
    raise AssertionError(left)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("codes", 1),
        ("codes", 2),
        ("codes", 3),
        pytest.param("d3m", 1, marks=pytest.mark.slow),
        pytest.param("d3m", 2, marks=pytest.mark.slow),  # but for the one that is killed below
        pytest.param("d3m", 3, marks=pytest.mark.slow),
        pytest.param("classcond", 2, marks=pytest.mark.slow),
        pytest.param("minimax", 2, marks=pytest.mark.slow),
    ],
)
def test_shards_in_a_bucket_merge_to_the_bytes_of_a_run_on_a_disk(
    home: Path,
    any_bucket: str,
    wholes: Callable[[str], bytes],
    machine: Callable[[], Any],
    name: str,
    count: int,
) -> None:
    output = f"{any_bucket}/sets/x.d3m"
    in_turn(home, output, settings_by_name(home, name), count, machine)
    merge([f"{output}.parts"], output, **machine())
    assert ObjectPath(output).read_bytes() == wholes(name)
    if name == "classcond":
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert Path("x.backbone", weights).read_bytes() == (
            (home / "classcond.backbone" / weights).read_bytes()
        )
        assert not any("/cache/" in key for key in ObjectPath(any_bucket).tree())


def test_a_run_without_shards_goes_on_elsewhere(
    home: Path,
    any_bucket: str,
    wholes: Callable[[str], bytes],
    machine: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, settings = f"{any_bucket}/x.d3m", settings_by_name(home, "codes")
    seen: list[dict[str, Any]] = []

    def lose(event: dict[str, Any]) -> None:
        seen.append(event)
        if event["event"] == "step" and event["stage"] == "code photographs":
            raise KeyboardInterrupt

    for _ in range(3):  # a class each time
        with pytest.raises(KeyboardInterrupt):
            encode(home / "source", output, settings, listeners=[lose], **machine())
    assert not ObjectPath(output).exists()
    calls: list[dict[str, Any]] = []
    encode(home / "source", output, settings, listeners=[calls.append], **machine())
    assert not [c for c in calls if c["event"] == "step" and c["stage"] == "code photographs"]
    assert ObjectPath(output).read_bytes() == wholes("codes")
    assert not list(Path().glob("*.work"))


@pytest.mark.slow
def test_a_training_goes_on_elsewhere(
    home: Path, bucket: str, wholes: Callable[[str], bytes], machine: Callable[[], Any]
) -> None:
    output, settings = f"{bucket}/x.d3m", settings_by_name(home, "classcond")
    for stage in ("encode the images", "train the diffusion model", "make and judge candidates"):

        def lose(event: dict[str, Any], stage: str = stage) -> None:
            if event["event"] == "step" and event["stage"] == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode(home / "source", output, settings, listeners=[lose], **machine())
    stages: list[str] = []
    encode(
        home / "source",
        output,
        settings,
        listeners=[lambda event: stages.append(event.get("stage", ""))],
        **machine(),
    )
    assert "train the diffusion model" not in stages
    assert ObjectPath(output).read_bytes() == wholes("classcond")


@pytest.fixture
def failing_s3(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every fourth call of each kind fail, before or after it has reached the server."""
    import s3fs

    ask, failed = s3fs.S3FileSystem._call_s3, []
    counts: Counter[str] = Counter()

    async def call(self: Any, method: str, *args: Any, **more: Any) -> Any:
        counts[method] += 1
        fails = counts[method] % 4 == 0
        answer = None if counts[method] % 8 == 0 else await ask(self, method, *args, **more)
        if fails:
            failed.append(method)
            raise ConnectionResetError(errno.ECONNRESET, "reset by the store")
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    monkeypatch.setattr("d3pack.system.objects._WAIT", 0)
    return failed


def test_a_bucket_that_fails_now_and_then_does_not_show(
    home: Path,
    bucket: str,
    wholes: Callable[[str], bytes],
    machine: Callable[[], Any],
    failing_s3: list[str],
) -> None:
    output = f"{bucket}/x.d3m"
    in_turn(home, output, settings_by_name(home, "codes"), 2, machine)
    merge([f"{output}.parts"], output, **machine())
    assert ObjectPath(output).read_bytes() == wholes("codes")
    assert {"put_object", "list_objects_v2", "get_object"} <= set(failing_s3), failing_s3


PROGRAM = """
import sys
from pathlib import Path
from encode_world import quick
from d3pack.encode import encode_shard
from d3pack.encode.methods.d3m import inversion
from d3pack.system import Shard
home, output, pilot = sys.argv[1:]
inversion.PILOT = int(pilot)
settings = quick(home + "/sd", codes=2, code_steps=3, code_bits=4)
encode_shard(home + "/source", output, Shard(1, 2), settings, teachers=Path("teachers"),
             listeners=[lambda event: print(event, flush=True)])
"""


def test_a_killed_shard_goes_on_from_an_empty_disk(
    home: Path, bucket: str, wholes: Callable[[str], bytes], machine: Callable[[], Any]
) -> None:
    output, settings = f"{bucket}/x.d3m", settings_by_name(home, "d3m")
    machine()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": os.getcwd()}
    words = [sys.executable, "-c", PROGRAM, str(home), output, str(inversion.PILOT)]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'step'" in line and "'invert'" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    part = ObjectPath(f"{output}.parts/1-of-2")
    assert {"journal.json", "lease", "teacher.safetensors"} <= set(part.tree())
    events: list[dict[str, Any]] = []
    in_turn(home, output, settings, 2, machine, listeners=[events.append])
    assert not any(event.get("stage") == "train the teacher" for event in events)
    assert "lease" not in part.tree()
    merge([f"{output}.parts/{n}-of-2" for n in (2, 1)], output, **machine())
    assert ObjectPath(output).read_bytes() == wholes("d3m")


def test_commands_take_buckets(
    home: Path, bucket: str, machine: Callable[[], Any], tmp_path: Path
) -> None:
    source, output = make_tree(tmp_path / "photos", count=2), f"{bucket}/x.d3m"
    words = ["--backbone", str(home / "sd"), "--bytes-per-image", "3", "--device", "cpu"]
    for number in (1, 2):
        machine()
        result = invoke("code", source, "-o", output, "--shard", f"{number}/2", *words)
        assert result.exit_code == 0, result.stderr
    assert f"d3pack merge {output}.parts -o {output}" in result.stderr
    result = invoke("merge", f"{output}.parts", "-o", tmp_path / "x.d3m")
    assert result.exit_code == 0, result.stderr
    assert invoke("code", source, "-o", tmp_path / "whole.d3m", *words).exit_code == 0
    assert (tmp_path / "x.d3m").read_bytes() == (tmp_path / "whole.d3m").read_bytes()
    result = invoke("merge", f"{bucket}/other.parts", "-o", tmp_path / "y.d3m")
    assert "there is no part" in result.stderr
    with pytest.raises(UsageError, match="1 of 2 parts are missing: 2-of-2"):
        merge([f"{output}.parts/1-of-2"], tmp_path / "y.d3m")
