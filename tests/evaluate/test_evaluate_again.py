"""The benchmark of encoding again: other packs by other seeds, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from encode_world import make_tree, quick
from evaluate_world import BLINK
from tiny_backbones import tiny_sd

import d3pack
from benchmarks import again

pytestmark = pytest.mark.heavy


def test_encodings_differ_by_their_seeds_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    make_tree(tmp_path / "real" / "train", count=12)
    make_tree(tmp_path / "real" / "test", count=5)
    settings = quick(tiny_sd(tmp_path / "sd"), candidates=1, labels="none")
    work = tmp_path / "work"
    work.mkdir()
    figures = again.measure(tmp_path / "real", work, settings, [60, 120], 2, BLINK)
    assert set(figures) == {"60", "120"}
    roots = {d3pack.read(path).root for path in work.glob("*.d3m")}
    assert len(roots) == 4
    for row in figures.values():
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2, abs=1e-4)
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracies"])
        assert len(row["bytes"]) == 2
    monkeypatch.setattr(again, "encode", lambda *_: pytest.fail("it is there"))
    assert again.measure(tmp_path / "real", work, settings, [60, 120], 2, BLINK) == figures
