"""Processes that fill one cold store together: each image is decoded once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dataset_packs import tiny_pack
from places import HELPERS

import d3pack
from d3pack.dataset import list_stores

pytestmark = pytest.mark.e2e

IMAGES = 111


@pytest.fixture
def folder(backbone: Path, tmp_path: Path) -> Path:
    d3pack.write(tiny_pack(backbone, images=37), tmp_path / "tiny.d3m")
    (tmp_path / "tiny.backbone").symlink_to(backbone)
    return tmp_path


def run(folder: Path, name: str, how: str, die_at: int = 0) -> list[list[int]]:
    """Start two processes at once; return what each decoded. The second one may be killed."""
    (folder / "go").unlink(missing_ok=True)
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HELPERS / "dataset_cold.py"), str(folder)]
    names = [f"{name}.{rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen([*script, names[rank], how, str(rank), "2", str(die_at * rank)], env=env)
        for rank in range(2)
    ]
    try:
        until = time.monotonic() + 200
        while not all((folder / f"ready-{name}").exists() for name in names):
            assert time.monotonic() < until
            assert not any(rank.poll() for rank in ranks)
            time.sleep(0.02)
        (folder / "go").touch()
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, -signal.SIGKILL if die_at else 0]
    notes = [folder / f"decoded-{name}" for name in names]
    return [[int(n) for n in note.read_text().split()] if note.exists() else [] for note in notes]


@pytest.mark.parametrize("how", ["items", "gloo"])
def test_two_processes_decode_each_image_once(folder: Path, how: str) -> None:
    """`items`: both want the same images in the same order. `gloo`: each rank has its share."""
    first, second = run(folder, "a", how)
    assert sorted(first + second) == list(range(IMAGES))
    assert min(len(first), len(second)) > IMAGES // 4, "both of them decode"


@pytest.mark.parametrize("how", ["items", pytest.param("loader", marks=pytest.mark.slow)])
def test_images_of_a_killed_process_are_decoded_by_others(folder: Path, how: str) -> None:
    """Killed in its third call, with the images of the call claimed and not stored.

    With `items`, the other process wants these images, and goes on to the end; with `loader`, they
    are of the killed rank, which is started again.
    """
    first, killed = run(folder, "a", how, die_at=3)
    if how == "items":
        assert sorted(first + killed) == list(range(IMAGES))
    later = [number for numbers in run(folder, "b", how) for number in numbers]
    assert sorted(first + killed + later) == list(range(IMAGES))
    (entry,) = list_stores(folder / "cache")
    assert entry.decoded == IMAGES
