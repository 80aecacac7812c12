"""A family from another package: found by its entry point, opened by its class."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_backbones import tiny_dit

from d3pack.backbones import kinds, lock_directory, open_backbone

MODULE = """
from d3pack.backbones.dit import LAYOUT, DiT

KIND = "framed"


class Framed(DiT):
    frame = 4
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    info = site / "framed-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "framed_family.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: framed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[d3pack.backbones]\nframed = framed_family:Framed\ndit = framed_family:Framed\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    kinds.cache_clear()
    yield
    kinds.cache_clear()
    sys.modules.pop("framed_family", None)


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
