"""Photographs that cannot be read: counted and named, or one line where a class has no other."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from d3pack.errors import SourceError
from d3pack.sources import open_source
from d3pack.train import TrainSettings
from d3pack.train.config import PRESETS
from d3pack.train.data import load_photos
from d3pack.train.run import TrainingRun


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four images; one file of each is damaged, under a name that is no UTF-8."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 9, 9)).save(tmp_path / "photos" / name / f"{i}.png")
        (tmp_path / "photos" / name / "bad\udcff.png").write_bytes(b"junk")
    return tmp_path / "photos"


def test_a_class_without_one_readable_image(photos: Path, tmp_path: Path) -> None:
    for path in (photos / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="no image of class 'b' can be read; repair its files"):
        load_photos(open_source(photos), tmp_path / "cache", 32, 1, lambda *_: None)


def test_files_left_out_are_told_each_time(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "d3pack")
    output, settings = tmp_path / "out", TrainSettings(device="cpu")
    for _ in range(2):  # the second run reads what the first has kept
        caplog.clear()
        run = TrainingRun(str(photos), output, settings, PRESETS["tiny"], lambda event: None)
        assert len(run.photos.labels) == 8
        listed = run.cache / "skipped.txt"
        assert caplog.messages == [f"skipped 2 files: {listed} names them"]
    assert listed.read_text().splitlines()[0] == "a\tbad\\udcff.png\tnot an image in a known format"
