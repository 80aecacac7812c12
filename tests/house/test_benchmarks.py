"""The benchmarks: one runner, one schema for results."""

from __future__ import annotations

import json
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
from places import ROOT

from benchmarks import __main__ as runner
from benchmarks import resume, resume_peers
from benchmarks.many import plan
from benchmarks.results import KEYS, RESULTS, load, save


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_result_follows_the_schema(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) == KEYS
    assert record["figures"]
    assert record["command"].startswith("python ")


def test_saved_result_is_loaded_again(tmp_path: Path) -> None:
    save(tmp_path / "x.json", "what", "python -m benchmarks x", {"rate": 1.5})
    assert set(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))) == KEYS
    assert load(tmp_path / "x.json") == {"rate": 1.5}
    assert load(tmp_path / "missing.json") == {}


def test_guide_shows_the_committed_table_of_resumed_loaders() -> None:
    figures = load("resume")
    guide = (ROOT / "docs" / "guides" / "train.md").read_text(encoding="utf-8")
    assert resume.table(figures) in guide
    for name in ("d3pack, loader", "d3pack, DataLoader over batch_order"):
        cells = figures["loaders"][name]["cells"]
        assert len(cells) == 9
        assert set(cells.values()) == {"exact"}


@pytest.mark.parametrize(
    ("more", "words"),
    [([], "exact"), ([0, 1], "2 twice"), ([-1], "1 never"), ([0, -2], "1 twice, 1 never")],
)
def test_verdict_counts_samples_that_are_repeated_or_missing(more: list[int], words: str) -> None:
    samples = list(range(resume_peers.IMAGES))
    for number in more:
        if number < 0:
            samples.remove(-number)
        else:
            samples.append(number)
    assert resume.verdict(samples) == words


def test_hours_of_the_guide_are_those_of_the_plan() -> None:
    guide = RESULTS.parent.parent / "docs" / "guides" / "many-machines.md"
    assert plan() in guide.read_text(encoding="utf-8")


def test_runner_lists_benchmarks_and_refuses_unknown_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert runner.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("decode", "encode", "table"))
    assert all(runner.names().values()), "every benchmark says in its first line what it measures"
    for name in runner.names():
        parameters = signature(import_module(f"benchmarks.{name}").main).parameters
        assert len(parameters) == 1, f"the runner hands {name} the rest of the command line"
    assert runner.main(["nothing"]) == 2
    assert "no benchmark 'nothing'" in capsys.readouterr().err
