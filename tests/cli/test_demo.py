"""The demo from end to end, with less to do: what it leaves behind is real."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from cli_schema import check_output

import d3pack
from benchmarks import demo as copies
from d3pack.demo import NAMES, SETTINGS, Demo, example_figures, run_demo
from d3pack.demo.photographs import rebuild_photographs
from d3pack.encode import D3MSettings
from d3pack.sources import open_source

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


def test_example_is_what_was_measured() -> None:
    assert example_figures() == copies.figures(), "run: python -m benchmarks demo"
    pack = (copies.FOLDER / "cifar10.d3m").read_bytes()
    assert pack == copies.PACK.read_bytes(), "run: python -m benchmarks demo"


@pytest.mark.e2e
def test_demo_leaves_a_pack_a_page_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    kept: list[Demo] = []

    def shorter(folder: Path, **how: Any) -> Demo:
        kept.append(run_demo(folder, settings=SHORT, updates=3, **how))
        return kept[0]

    monkeypatch.setattr("d3pack.demo.run_demo", shorter)
    monkeypatch.setattr(rebuild_photographs, "__defaults__", (1,))
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
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert pack.root[:12] in report
    figures = check_output("demo", json.dumps(kept[0].to_json()))
    assert figures["root"] == pack.root
    kinds = {key.partition("-")[0] for key in figures["accuracy"]}
    assert kinds == {"pack", "webp", "random"}
    assert all(0 <= value <= 1 for value in figures["accuracy"].values())
    assert done.stdout == kept[0].sentence() + "\n"
    told = f"{len(pack)} handwritten digits became a file of {pack.ledger().total:,} bytes"
    assert done.stdout.startswith(told)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"<h1>{kept[0].sentence()}</h1>" in page
    assert page.count("data:image/webp") == 3  # real digits, those of the pack, photographs
    shares = re.findall(r'class="share">([\d.]+) %<', page)
    measured = [*figures["accuracy"].values(), *(row["mean"] for row in example_figures()["rows"])]
    assert shares == [f"{100 * value:.1f}" for value in measured]
    assert all((tmp_path / "out" / link).is_file() for link in re.findall('href="([^"]+)"', page))
    steps = [line[0] for line in done.stderr.splitlines() if line[1:4] == "/4 "]
    assert steps == ["1", "2", "3", "4"]
    assert (tmp_path / "out" / "index.html").as_uri() in done.stderr.splitlines()[-1]
