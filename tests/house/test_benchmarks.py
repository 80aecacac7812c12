"""The benchmarks: one runner, one schema for results."""

from __future__ import annotations

import json
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from benchmarks import __main__ as runner
from benchmarks import fuzz, readme, results, resume, resume_peers
from benchmarks.many import plan
from benchmarks.results import KEYS, RESULTS, load, save


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_result_follows_the_schema(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) == KEYS
    assert all(record.values()), "what was not recorded is called so"
    assert record["command"].startswith("python ")


def test_saved_result_is_loaded_again(tmp_path: Path) -> None:
    save(tmp_path / "x.json", "what", "python -m benchmarks x", {"rate": 1.5})
    assert set(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))) == KEYS
    assert load(tmp_path / "x.json") == {"rate": 1.5}
    assert load(tmp_path / "missing.json") == {}


@pytest.mark.e2e
def test_fuzzing_goes_on_behind_the_inputs_of_before() -> None:
    first = fuzz.more("embeddings", {}, 40)
    second = fuzz.more("embeddings", first, 30)
    whole = fuzz.more("embeddings", {}, 70)
    assert (second["inputs"], second["next"], second["faults"]) == (70, fuzz.FIRST + 70, [])
    assert second["codes"] == whole["codes"]
    assert {"images", "sources"} < set(fuzz.targets())


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


def priced(way: str, images: int, mean: float = 0.4, **changes: Any) -> dict[str, Any]:
    """A row of a benchmark of methods."""
    quick = {"last": {"mean": mean, "std": 0.004}, "runs": [{}] * 3}
    row = {
        "way": way,
        "title": way,
        "after": None,
        "images_per_class": images,
        "bytes": 1234,
        "backbone_bytes": 23_480_664,
        "own_backbone": False,
        "asks_teacher": True,
        "encode": {"images_per_class": 50, "seconds": 125.0, "cpu_seconds": 120.0, "threads": 1},
        "speed": {"images_per_second": 41.2},
        "likeness": {"precision": 0.98, "recall": 0.57, "coverage": 0.84},
        "students": {"quick": quick},
    }
    return row | changes


def priced_record(*rows: dict[str, Any]) -> dict[str, Any]:
    figures = {
        "target": "cifar10",
        "classes": {"cat": False, "dog": False},
        "images": {"train": 50_000, "test": 10_000},
        "teacher": {"seconds": 905.0, "cpu_seconds": 880.0},
        "ways": ["photographs", "codes", "d3m", "classcond", "minimax"],
        "rows": {f"{row['way']} {row['images_per_class']}": row for row in rows},
    }
    return {"date": "2026-12-01", "machine": {"cores": 2}, "figures": figures}


def test_costs_are_shown_from_cheap_to_dear_and_only_what_was_measured() -> None:
    taught = priced("d3m", 10)["students"]
    record = priced_record(
        priced("minimax", 10, own_backbone=True, after="classcond", students={}),
        priced("d3m", 50, mean=0.5),
        priced("d3m", 10, students={"standard": taught["quick"]}),
        priced("codes", 10, asks_teacher=False),
    )
    text = readme.cost_table("methods-cifar10.json", record)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.strip("| ").split(" | ") for line in lines[1:]] == [
        [name, count, took, "1,234 B", f"23.5 MB, {whose}", "41", *taught, "0.98 / 0.57 / 0.84"]
        for name, count, took, whose, *taught in (
            ("`codes`", "10", "2 min 05 s (2 min 00 s)", "shared", "40.0 ± 0.4 %", "–"),
            ("`d3m`", "10", "2 min 05 s (2 min 00 s) + teacher", "shared", "–", "40.0 ± 0.4 %"),
            ("`d3m`", "50", "2 min 05 s (2 min 00 s) + teacher", "shared", "50.0 ± 0.4 %", "–"),
            (
                "`minimax`",
                "10",
                "2 min 05 s (2 min 00 s) + teacher + `classcond`",
                "its own",
                "–",
                "–",
            ),
        )
    ]
    assert (
        "CIFAR-10: 50,000 training images, 10,000 test images, 3 students each, measured on 2026"
        in text
    )
    assert "photographs of none of its classes" in text
    assert "1 of 2 cores" in text
    assert "15 min 05 s (14 min 40 s)" in text


def test_photographs_and_packs_that_carry_their_backbone_have_cells_of_their_own() -> None:
    photographs = {
        "way": "photographs", "title": "random photographs", "images_per_class": 1,
        "likeness": {"right": 0.9}, "students": priced("d3m", 1)["students"],
    }  # fmt: skip
    carried = priced("classcond", 10, own_backbone=True, backbone_bytes=0)
    text = readme.cost_table("methods-cifar10.json", priced_record(photographs, carried))
    assert "| random photographs | 1 | – | – | – | – | 40.0 ± 0.4 % | – | – / – / – |" in text
    assert "| 1,234 B | in the pack | 41 |" in text


def test_classes_that_the_backbone_has_seen_are_told_apart() -> None:
    assert readme.seen({"cat": True, "dog": True}).endswith("photographs of all of its classes.")
    assert readme.seen({"cat": True, "dog": False}).endswith("photographs of cat; not of dog.")


def test_table_of_before_goes_when_one_version_has_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = readme.costs_before()
    for path in RESULTS.glob("*.json"):
        if not path.name.startswith("methods-"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    file = tmp_path / "methods-cifar10.json"
    ways = priced_record()["figures"]["ways"]
    both = {name: priced("d3m", 10)["students"]["quick"] for name in ("quick", "standard")}
    rows = [priced(name, count, students=both) for name in ways for count in (10, 50)]
    short = priced(ways[-1], 50)  # without the longer training
    for some in ([], rows[:1], rows[1::2], rows[:-1], [*rows[:-1], short], rows):
        if some:
            file.write_text(json.dumps(priced_record(*some)), encoding="utf-8")
        made = readme.blocks()
        guide, page = made[readme.GUIDE], made[readme.ALL_RESULTS]
        assert (before in guide) == (some != rows)
        assert ("The three methods" in page) == (some != rows)
        assert ("choosing-a-method.md" in page) == (some == rows)
        assert guide.count("| `codes` |") == sum(row["way"] == "codes" for row in some)


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
