"""The demo from end to end, with less to do: what it leaves behind is real."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import d3pack
from d3pack.demo import NAMES, OPTIONS, run_demo
from d3pack.sources import open_source

SHORT = replace(
    OPTIONS,
    images_per_class=2,
    steps=2,
    cool=1,
    sampler_steps=2,
    probes=1,
    teacher_samples=200,
    pool=24,
)


def test_demo_leaves_a_pack_a_sheet_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    said: list[str] = []
    done = run_demo(
        tmp_path / "out",
        options=SHORT,
        updates=3,
        view=lambda: nullcontext(lambda event: None),
        say=said.append,
    )
    digits = tmp_path / "out" / "digits"
    train, test = open_source(digits), open_source(digits, split="test")
    assert sorted(train.classes) == sorted(NAMES)
    assert sum(train.counts) + sum(test.counts) == 1797
    assert sum(test.counts) == 360
    pack = d3pack.read(tmp_path / "out" / "digits.d3m")
    assert pack.root == done.pack.root
    assert len(pack) == 20
    assert pack.recipe.backbone.repo == "mini"
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.height > 10 * 72
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert pack.root[:12] in report
    figures = done.to_json()["accuracy"]
    assert len(figures) == 3
    assert all(0 <= value <= 1 for value in figures.values())
    assert f"{len(pack)} images of 10 classes travel in {pack.ledger().total:,} bytes" in (
        done.sentence()
    )
    assert [line[0] for line in said if line[0].isdigit()] == ["1", "2", "3", "4"]
