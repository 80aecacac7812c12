"""The benchmark of all methods: each makes its pack, and what is measured is not measured again."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import invoke
from encode_world import CLASSES, make_tree
from evaluate_world import BLINK
from tiny_backbones import tiny_sd

from benchmarks import methods, results
from benchmarks.methods import PHOTOGRAPHS, WAYS, Clock, Run, Way, manifold, seen_classes
from d3pack.decode import Decoder
from d3pack.encode import (
    ClassCondSettings,
    D3MSettings,
    EncodeSettings,
    MinimaxSettings,
    available_methods,
)
from d3pack.encode.methods.d3m import one_pass
from d3pack.students import PROTOCOLS
from d3pack.system import plain

SHORT: dict[str, Any] = {
    "d3m": D3MSettings(steps=4, cool=2, batch=6, triples=4, pool=8),
    "classcond": ClassCondSettings(model="tiny", search_images=0),
    "minimax": MinimaxSettings(train_steps=3, search_images=12),
}
LONG = {"train_steps", "train_seconds", "search_images"}  # settings of a way that stay short


def candidates_of(settings: EncodeSettings) -> int | None:
    """Return the candidates of an image, which `d3m` has without being asked."""
    return settings.candidates or (2 if settings.method == "d3m" else None)


def short(way: Way, backbone: Path) -> Way:
    """The same method, with less to do."""
    own = way.settings.method_settings
    if (brief := SHORT.get(way.settings.method)) is not None:
        chosen = plain(own, private=False) if own else {}
        own = replace(brief, **{name: v for name, v in chosen.items() if name not in LONG})
    settings = replace(
        way.settings,
        method_settings=own,
        sampler_steps=None if way.settings.method == "codes" else 2,
        group=3,
        backbone=None if way.settings.method in ("classcond", "minimax") else str(backbone),
        candidates=min(2, tried) if (tried := candidates_of(way.settings)) else None,
    )
    if settings.codes or settings.method in ("codes", "modes"):
        settings = replace(settings, code_steps=4)
    return replace(way, settings=settings)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PROTOCOLS, "blink", BLINK)
    monkeypatch.setattr(one_pass, "STATES", 12)
    monkeypatch.setattr(one_pass, "ROUNDS", 2)
    tiny_sd(tmp_path / "sd")
    make_tree(tmp_path / "real" / "train", count=12)
    make_tree(tmp_path / "real" / "test", count=4)
    return opened(tmp_path)


def opened(folder: Path, most: int = 4) -> Run:
    ways = {
        name: replace(short(way, folder / "sd"), most=min(way.most, most))
        for name, way in WAYS.items()
    }
    return Run(folder / "real", folder / "work", ways=ways, teacher_samples=60)


def measured(run: Run, figures: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """Measure, and return what was kept after each figure."""
    kept: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {
        "only": [PHOTOGRAPHS, *WAYS],
        "ipc": [4],
        "protocols": ["blink"],
        "seeds": 1,
    }
    run.measure(figures, **(chosen | changes), keep=lambda all_: kept.append(deepcopy(all_)))
    return kept


@pytest.mark.slow
def test_every_method_has_its_rows(run: Run) -> None:
    figures: dict[str, Any] = {}
    measured(run, figures)
    measured(run, figures, only=["minimax"], ipc=[2])
    rows = json.loads(json.dumps(figures, allow_nan=False))["rows"]
    assert [*rows] == [f"{PHOTOGRAPHS} 4", *(f"{name} 4" for name in WAYS), "minimax 2"]
    assert rows.pop(f"{PHOTOGRAPHS} 4")["students"]["blink"]["runs"][0]["images"] == 12
    for key, row in rows.items():
        way = WAYS[row["way"]]
        assert key == f"{row['way']} {row['images_per_class']}"
        assert row["provenance"]["method"] == way.settings.method
        assert row["bytes"] > 0
        assert row["encode"]["images_per_class"] == 4
        assert row["encode"]["cpu_seconds"] > 0
        assert row["speed"]["images_per_second"] > 0
        assert 0 <= row["likeness"]["coverage"] <= 1
        assert row["students"]["blink"]["runs"][0]["images"] == 3 * row["images_per_class"]
        assert row["asks_teacher"] == (way.settings.method not in ("codes", "modes"))
    assert rows["minimax 4"]["adapter_bytes"] == rows["minimax 2"]["adapter_bytes"] > 0
    assert rows["minimax 4"]["backbone_bytes"] == rows["classcond 4"]["backbone_bytes"] > 0
    embedded = rows["classcond-embedded 4"]
    assert (embedded["backbone_bytes"], embedded["own_backbone"]) == (0, True)
    assert len({rows[f"{name} 4"]["root"] for name in WAYS}) == len(WAYS)
    assert rows["d3m-one-pass 4"]["sampler"][2] == 1
    assert rows["d3m 4"]["sampler"][2] > 1
    assert figures["teacher"]["cpu_seconds"] > 0
    assert len([*(run.work / "teachers").iterdir()]) == 1, "encode trains none in the time of a row"


@pytest.mark.heavy
def test_stopped_run_goes_on_and_measures_nothing_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    chosen: dict[str, Any] = {"only": ["modes", "codes"], "protocols": ["blink"], "ipc": [4]}

    def stop(kept: dict[str, Any]) -> None:
        figures.update(json.loads(json.dumps(kept)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.measure({}, **chosen, seeds=1, keep=stop)
    assert [*figures["rows"]] == ["codes 4"], "the cheaper one first, its pack before its students"
    assert figures["rows"]["codes 4"]["students"] == {}
    before = deepcopy(figures["rows"]["codes 4"])
    assert len(measured(opened(tmp_path), figures, **chosen)) == 3
    assert [*figures["rows"]] == ["codes 4", "modes 4"]
    assert figures["rows"]["codes 4"] | {"students": {}} == before
    assert {len(row["students"]["blink"]["runs"]) for row in figures["rows"].values()} == {1}

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("all packs are there")

    monkeypatch.setattr(methods, "encode", never)
    again = opened(tmp_path)
    assert measured(again, figures, **chosen) == []
    assert len(measured(again, figures, **(chosen | {"only": ["modes"]}), seeds=2)) == 2
    assert len(figures["rows"]["modes 4"]["students"]["blink"]["runs"]) == 2
    took = figures["rows"]["modes 4"]["encode"]
    figures["rows"]["modes 4"]["settings"] = {}
    assert len(measured(again, figures, **chosen)) == 2, "a row of other settings is made again"
    assert figures["rows"]["modes 4"]["encode"] == took


@pytest.mark.heavy
def test_photographs_are_other_ones_for_each_student_and_one_has_no_neighbours(run: Run) -> None:
    figures: dict[str, Any] = {}
    assert len(measured(run, figures, only=[PHOTOGRAPHS], ipc=[1, 4], seeds=2)) == 6
    one, four = json.loads(json.dumps(figures["rows"], allow_nan=False)).values()
    assert [*one["likeness"]] == ["right"]
    assert 0 < four["likeness"]["coverage"] <= 1
    assert [taught["images"] for taught in four["students"]["blink"]["runs"]] == [12, 12]
    assert "encode" not in one
    assert measured(run, figures, only=[PHOTOGRAPHS], ipc=[1, 4], seeds=2) == []


@pytest.mark.parametrize(("count", "names"), [(1, 0), (2, 4), (9, 4)])
def test_likeness_has_numbers_alone(count: int, names: int) -> None:
    real, made = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(0))
    figures = manifold(real, made)
    assert len(figures) == names
    assert all(0 <= value < 10 for value in figures.values())


@pytest.mark.heavy
def test_minimax_tunes_the_backbone_that_a_pack_carries(run: Run) -> None:
    minimax = replace(run.ways["minimax"], after="classcond-embedded")
    run.ways = {**run.ways, "minimax": minimax}
    made = run.made("minimax", 4)
    assert made.pack.adapter is not None
    assert made.folder is not None
    assert (made.folder / "model_index.json").is_file()
    with Decoder(made.pack, path=made.folder) as decoder:
        assert len(decoder.images([0, 1])) == 2


def test_settings_of_a_backbone_belong_to_the_pack_that_tunes_it(run: Run) -> None:
    before, path = run.described("minimax", 4), run.path("minimax", 4)
    assert before["after"] == run.described("classcond", 4)
    settings = replace(run.ways["classcond"].settings, seed=1)
    run.ways = {**run.ways, "classcond": replace(run.ways["classcond"], settings=settings)}
    assert run.described("minimax", 4) != before
    assert run.path("minimax", 4) != path
    assert run.described("d3m", 4) == methods.described(run.settings("d3m", 4))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name for name, way in WAYS.items() if way.first and name == way.settings.method]
)
def test_first_images_are_those_of_an_encoding_of_fewer(
    name: str, run: Run, tmp_path: Path
) -> None:
    first = run.made(name, 2)
    fewer = opened(tmp_path, most=2)
    own = fewer.made(name, 2)
    images = []
    for made in (first, own):
        with Decoder(made.pack, path=made.folder) as decoder:
            images.append(decoder.images(range(len(made.pack))))
    assert torch.equal(*images)


def test_clock_goes_on_where_a_stopped_run_was_last_heard(tmp_path: Path) -> None:
    path = tmp_path / "clock.json"
    path.write_text(json.dumps({"seconds": 100.0, "cpu_seconds": 50.0}))
    figures = Clock(path).finish()
    assert 100 <= figures["seconds"] < 130
    assert 50 <= figures["cpu_seconds"] < 80
    assert Clock(path).finish() == figures


def test_classes_that_the_backbone_has_seen_are_named() -> None:
    assert seen_classes("none", CLASSES) == dict.fromkeys(CLASSES, False)
    assert seen_classes("all", CLASSES) == dict.fromkeys(CLASSES, True)
    assert seen_classes("lemon", CLASSES) == {"goldfish": False, "lemon": True, "school bus": False}
    with pytest.raises(SystemExit, match="sofa"):
        seen_classes("sofa", CLASSES)


def test_every_method_of_encode_is_measured_and_named_by_its_options() -> None:
    assert {way.settings.method for way in WAYS.values()} == set(available_methods())
    titles = {name: way.title for name, way in WAYS.items()}
    assert len({*titles.values()}) == len(titles)
    assert titles["minimax"] == "minimax --ema 0.999 --train-steps 4000 --search-images 200"
    assert titles["minimax-average"] == "minimax --train-steps 4000 --search-images 200"
    assert titles["classcond-embedded"] == "classcond --embed-backbone --embed-bits 4"
    long = "classcond --candidates 8 --time-budget 6000.0s --embed-backbone --embed-bits 4"
    assert titles["classcond-long"] == long
    assert titles["d3m-one-pass"] == "d3m --guidance 1.5 --one-pass"
    assert titles["modes-weighed"] == "modes --weigh"


@pytest.mark.parametrize("title", [way.title for way in WAYS.values()])
def test_titles_are_words_of_the_command(title: str) -> None:
    done = invoke("encode", "nowhere", "--method", *title.split(), "--dry-run")
    assert done.exit_code == 5, done.stderr  # there is no such folder, and nothing else to refuse


def test_choices_of_seeds_have_equal_terms() -> None:
    ways = [WAYS[f"d3m-{name}"] for name in ("seeds", "draws", "teacher", "s3")]
    alike = {replace(way.settings, candidates=None, select="teacher") for way in ways}
    assert len(alike) == 1
    (settings,) = alike
    assert settings.guidance is not None
    assert settings.sampler is not None
    assert len({(way.settings.candidates, way.settings.select) for way in ways}) == 4
    guidance = WAYS["d3m-one-pass"].settings.guidance
    assert guidance is not None
    assert guidance > 1


def test_code_is_another_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d3pack").mkdir()
    (tmp_path / "d3pack" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    before = results.code()
    assert results.code() == before
    (tmp_path / "d3pack" / "a.py").write_text("x = 2\n")
    assert results.code() != before
