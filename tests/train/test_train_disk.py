"""A full disk is one line with a way to go on: no signal, and no library's own words."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from d3pack.errors import NoSpaceError
from d3pack.sources import open_source
from d3pack.train import TrainSettings, loop, train_backbone
from d3pack.train.data import Photos, cached_latents, load_photos

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four images."""
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 9, 9)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_room_is_taken_before_a_map_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(fd: int, offset: int, length: int) -> None:
        asked.append(length)
        raise FULL

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match="no space left on the disk; free some and run the same"):
        train_backbone(photos, tmp_path / "out", TrainSettings(preset="tiny", device="cpu"))
    assert asked == [128 + 8 * 32 * 32 * 3]
    monkeypatch.undo()
    again = load_photos(
        open_source(photos), tmp_path / "out/training/cache", 32, 1, lambda *_: None
    )
    assert len(again.labels) == 8


def test_a_checkpoint_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(loop, "save_file", full)
    module = torch.nn.Linear(2, 2)
    with pytest.raises(NoSpaceError, match="no space left") as caught:
        loop.save_state(
            tmp_path / "state.safetensors",
            module=module,
            shadow=module,
            optimizer=torch.optim.SGD(module.parameters()),
            state={},
        )
    assert caught.value.code == "E_NO_SPACE"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_latents_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(2)
    photos = Photos(("a", "b"), np.zeros((2, 8, 8, 3), np.uint8), rows, rows, rows)
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("d3pack.system.files.temporary_path", lambda path: tmp_path / "full")
    with pytest.raises(NoSpaceError, match="no space left") as caught:
        cached_latents(
            photos, lambda pixels: torch.zeros(len(pixels), 4, 99, 99), tmp_path, 0.0, 0, print
        )
    assert caught.value.code == "E_NO_SPACE"
