"""The demo from end to end, with less to do: what it leaves behind is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from PIL import Image

import d3pack
from d3pack.demo import NAMES, SETTINGS, Demo, run_demo
from d3pack.encode import D3MSettings
from d3pack.sources import open_source

pytestmark = pytest.mark.e2e

SHORT = replace(
    SETTINGS,
    images_per_class=2,
    codes=2,
    code_steps=3,
    sampler_steps=2,
    probes=1,
    teacher_samples=200,
    method_settings=D3MSettings(vectors=4, steps=2, cool=1, batch=20, triples=2, pool=24),
)


def test_demo_leaves_a_pack_a_sheet_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    kept: list[Demo] = []

    def shorter(folder: Path, **how: Any) -> Demo:
        kept.append(run_demo(folder, settings=SHORT, updates=3, **how))
        return kept[0]

    monkeypatch.setattr("d3pack.demo.run_demo", shorter)
    done = invoke("demo", "-o", str(tmp_path / "out"), "--format", "human")
    assert done.exit_code == 0, done.exception
    digits = tmp_path / "out" / "digits"
    train, test = open_source(digits), open_source(digits, split="test")
    assert sorted(train.classes) == sorted(NAMES)
    assert sum(train.counts) + sum(test.counts) == 1797
    assert sum(test.counts) == 360
    pack = d3pack.read(tmp_path / "out" / "digits.d3m")
    assert len(pack) == 20
    assert pack.recipe.backbone.repo == "mini"
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.height > 10 * 72
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert pack.root[:12] in report
    figures = kept[0].to_json()
    assert figures["root"] == pack.root
    assert len(figures["accuracy"]) == 3
    assert all(0 <= value <= 1 for value in figures["accuracy"].values())
    assert done.stdout == kept[0].sentence() + "\n"
    told = f"{len(pack)} images of 10 classes travel in {pack.ledger().total:,} bytes"
    assert done.stdout.startswith(told)
    steps = [line[0] for line in done.stderr.splitlines() if line[1:4] == "/4 "]
    assert steps == ["1", "2", "3", "4"]
    assert "report.html" in done.stderr.splitlines()[-1]
