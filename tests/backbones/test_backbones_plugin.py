"""A family from another package: found by its entry point, opened by its class."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_backbones import tiny_dit

from d3pack.backbones import kinds, lock_directory, open_backbone
from d3pack.testing import raises_code

MODULE = """
from d3pack.backbones.dit import LAYOUT, DiT


class Framed(DiT):
    frame = 4
"""
# the folders of a DiT, and one more that has a config alone
TIMED = """
from d3pack.backbones import DiT, Layout, Part
from d3pack.backbones.dit import LAYOUT as OTHER

LAYOUT = Layout((*OTHER.parts, Part("noise_schedule", "scheduler_config.json")))


class Timed(DiT):
    pass
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    info = site / "framed-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "framed_family.py").write_text(MODULE)
    (site / "timed_family.py").write_text(TIMED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: framed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[d3pack.backbones]\nframed = framed_family:Framed\ndit = framed_family:Framed\n"
        "timed = timed_family:Timed\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    kinds.cache_clear()
    yield
    kinds.cache_clear()
    for name in ("framed_family", "timed_family"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("plugin")
def test_plugin_adds_a_family_but_cannot_replace_one(tmp_path: Path) -> None:
    path = tiny_dit(tmp_path / "dit")
    ref = lock_directory(path, kind="framed")
    assert ref.kind == "framed"
    backbone = open_backbone(ref, path=path)
    assert type(backbone).__name__ == "Framed"
    assert backbone.latent_shape == (4, 8, 8)
    # what comes with d3pack cannot be replaced from outside: packs must mean one thing
    assert kinds()["dit"] == "d3pack.backbones.dit:DiT"


@pytest.mark.usefixtures("plugin")
def test_a_family_with_one_more_config_is_found_by_it_and_takes_no_other_directory(
    tmp_path: Path,
) -> None:
    path = tiny_dit(tmp_path / "dit")
    assert lock_directory(path).kind == "dit"
    (path / "noise_schedule").mkdir()
    config = path / "scheduler" / "scheduler_config.json"
    (path / "noise_schedule" / "scheduler_config.json").write_bytes(config.read_bytes())
    ref = lock_directory(path)
    assert ref.kind == "timed"
    assert type(open_backbone(ref, path=path)).__name__ == "Timed"


def test_a_directory_without_its_scheduler_is_told_which_file_is_missing(tmp_path: Path) -> None:
    path = tiny_dit(tmp_path / "dit")
    (path / "scheduler" / "scheduler_config.json").unlink()
    with raises_code("E_BACKBONE_MISSING", match="scheduler/scheduler_config.json is missing"):
        lock_directory(path)
