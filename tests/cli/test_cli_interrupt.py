"""Ctrl-C on every long verb: exit code 130, one line, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encode_world import make_tree
from forks import Forks, Run
from hub_loopback import LoopbackHub
from PIL import Image
from tiny_backbones import tiny_pack, tiny_sd

import d3pack
from d3pack.format.pack import Probes

pytestmark = [pytest.mark.e2e, pytest.mark.posix]

AGAIN = "interrupted; run the same command again and it goes on"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def forks(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    home = tmp_path_factory.mktemp("home")
    settings = {
        "D3PACK_HOME": str(home / "d3pack"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    with Forks(**settings) as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, images with a train and a test part, and a pack that takes long to decode."""
    root = tmp_path_factory.mktemp("world")
    make_tree(root / "real" / "train")
    make_tree(root / "real" / "test", 5)
    pack = tiny_pack(tiny_sd(root / "sd"), images=3000, group=2, steps=30)
    pack = replace(pack, classes=("goldfish", "lemon", "school bus"))
    numbers = np.arange(400, dtype=np.uint32)
    probes = Probes(np.zeros((400, 3, 4, 4), np.uint8), numbers % 3, numbers)
    d3pack.write(replace(pack, probes=probes), root / "large.d3m")
    return root


def ended(run: Run, said: str) -> tuple[str, str]:
    """How an interrupted verb ends; its output."""
    run.interrupt()
    code, out, err = run.result()
    assert code == 130, err
    assert err.rstrip().endswith(said) or f"{said} (" in err.splitlines()[-1], err
    assert "Traceback" not in out + err
    return out, err


def nothing_pending(folder: Path) -> None:
    assert [p for p in folder.rglob("*") if p.suffix in {".tmp", ".part", ".pending"}] == []


def test_an_interrupted_encode_says_how_to_go_on(forks: Forks, world: Path, tmp_path: Path) -> None:
    run = forks.start(
        "encode", world / "real" / "train", "-o", "o.d3m", "--backbone", world / "sd",
        "--steps", "5000", "--patience", "5000", "--teacher-samples", "200", "--format", "json",
        cwd=tmp_path,
    )  # fmt: skip
    run.until('"invert"')
    out, err = ended(run, AGAIN)
    assert "(o.d3m.work)" in err
    assert all(json.loads(line)["event"] for line in out.splitlines())
    assert not (tmp_path / "o.d3m").exists()
    nothing_pending(tmp_path)


def test_an_interrupted_train_says_how_to_go_on(forks: Forks, world: Path, tmp_path: Path) -> None:
    run = forks.start(
        "train", world / "real" / "train", "-o", "bb", "--preset", "tiny", "--format", "json",
        cwd=tmp_path,
    )  # fmt: skip
    run.until('"stage"')
    out, err = ended(run, AGAIN)
    assert "(bb/training)" in err
    assert all(json.loads(line)["stage"] for line in out.splitlines())
    assert not (tmp_path / "bb" / "unet").exists(), "no backbone that is not trained"
    nothing_pending(tmp_path)


def test_an_interrupted_decode_to_a_tree_says_how_to_go_on(
    forks: Forks, world: Path, tmp_path: Path
) -> None:
    run = forks.start("decode", world / "large.d3m", "-o", "out", "--backbone", world / "sd",
                      cwd=tmp_path)  # fmt: skip
    run.until(lambda: len(list(tmp_path.rglob("*.png"))) > 2)
    ended(run, AGAIN)
    files = list((tmp_path / "out").rglob("*.png"))
    assert files
    for file in files:
        with Image.open(file) as image:
            assert image.convert("RGB").size == (64, 64)
    nothing_pending(tmp_path)


def test_an_interrupted_decode_to_shards_says_how_to_go_on(
    forks: Forks, world: Path, tmp_path: Path
) -> None:
    run = forks.start("decode", world / "large.d3m", "-o", "out", "--to", "webdataset",
                      "--backbone", world / "sd", cwd=tmp_path)  # fmt: skip
    mark = tmp_path / "out" / ".d3pack-export.json"
    run.until(lambda: mark.exists() and [p for p in tmp_path.rglob("*.part") if p.stat().st_size])
    ended(run, AGAIN)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".d3pack-export.json"]


def test_an_interrupted_eval_says_how_to_go_on(forks: Forks, world: Path, tmp_path: Path) -> None:
    run = forks.start(
        "eval", world / "large.d3m", "--real", world / "real", "--backbone", world / "sd",
        "--protocol", "quick", "--yes", "--work", "w", "--report", "r.html", cwd=tmp_path,
    )  # fmt: skip
    run.until(lambda: run.err)
    ended(run, AGAIN)
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "w" / "evaluation.json").exists()
    nothing_pending(tmp_path)


def test_an_interrupted_verify_ends_in_one_line(forks: Forks, world: Path, tmp_path: Path) -> None:
    run = forks.start("verify", "--decode", world / "large.d3m", "--backbone", world / "sd",
                      cwd=tmp_path)  # fmt: skip
    run.until("rebuilding 400 probes")
    out, _ = ended(run, "interrupted")
    assert out == "", "no verdict on what was not looked at"


def test_an_interrupted_demo_says_how_to_go_on(forks: Forks, tmp_path: Path) -> None:
    run = forks.start("demo", "-o", "d", cwd=tmp_path)
    run.until("2/4")
    ended(run, "interrupted; run it again and it goes on")
    assert not (tmp_path / "d" / "digits.d3m").exists()
    nothing_pending(tmp_path)


def test_an_interrupted_pull_leaves_nothing_half(
    forks: Forks, world: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    data = (world / "large.d3m").read_bytes()
    hub.put("org/set", {"a.d3m": data})
    stall = hub.fault("stall", r"/cdn/", after=len(data) // 2, seconds=60.0)
    run = forks.start("pull", "hf://datasets/org/set/a.d3m", cwd=tmp_path)
    run.until(lambda: stall.times == 0)
    time.sleep(0.2)  # half of the file is on its way
    ended(run, "interrupted")
    assert list(tmp_path.iterdir()) == []
    again = forks.start("pull", "hf://datasets/org/set/a.d3m", cwd=tmp_path)
    assert again.result()[0] == 0
    assert (tmp_path / "a.d3m").read_bytes() == data


def test_an_interrupted_import_of_libraries_ends_without_a_traceback(
    world: Path, tmp_path: Path
) -> None:
    """The first seconds of a verb go into imports; Ctrl-C is welcome there too."""
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Stop:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["d3pack", "decode", sys.argv[1], "-o", "out"]
from d3pack.cli import main
main()
"""
    command = [sys.executable, "-c", program, str(world / "large.d3m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not (tmp_path / "out").exists()
