"""A training on 1, then 3, then 2 ranks, killed twice in the middle of an epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import HELPERS

import d3pack
from d3pack.dataset import D3MDataset


def run(folder: Path, world: int, batch: int, die_at: int) -> None:
    """Start the ranks; once one of them is killed, kill the others where they stand."""
    script = str(HELPERS / "dataset_ranks.py")
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *map(str, (rank, world, batch, die_at))],
            env=env,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    try:
        until = time.monotonic() + 100
        while any(rank.poll() is None for rank in ranks):
            assert time.monotonic() < until
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
        said = [rank.communicate()[1].decode() for rank in ranks]
    if die_at:
        assert ranks[-1].returncode == -signal.SIGKILL, said
    else:
        assert [rank.returncode for rank in ranks] == [0] * world, said


@pytest.mark.heavy
def test_every_image_is_seen_once_an_epoch_despite_kills_and_other_ranks(
    backbone: Path, tmp_path: Path
) -> None:
    from dataset_packs import tiny_pack

    pack = tiny_pack(backbone, images=17)
    d3pack.write(pack, tmp_path / "tiny.d3m")
    filled = D3MDataset(pack, backbone=backbone, cache_dir=tmp_path / "cache", quiet=True)
    assert sum(len(labels) for _, labels in filled.loader(17, shuffle=True)) == 51
    filled.close()

    def consumed() -> tuple[int, int]:
        state = json.loads((tmp_path / "checkpoint.json").read_text())["loader"]
        return state["epoch"], state["consumed"]

    run(tmp_path, world=1, batch=7, die_at=3)
    assert consumed() == (0, 14)
    run(tmp_path, world=3, batch=4, die_at=3)
    assert consumed() == (0, 38)
    run(tmp_path, world=2, batch=5, die_at=0)
    assert consumed() == (2, 0)
    counts = json.loads((tmp_path / "checkpoint.json").read_text())["counts"]
    assert counts == [[1] * 51, [1] * 51]
