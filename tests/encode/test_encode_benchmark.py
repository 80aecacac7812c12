"""The benchmark of prompts against textual inversion: both sides are judged by one rule."""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import make_tree
from tiny_backbones import tiny_sd

from benchmarks import encode, encode_peer, encode_shared, many, readme
from benchmarks.encode import first_hit, late, race, times
from benchmarks.encode_peer import SCRIPT, Peer, peer_trace
from benchmarks.encode_sides import Point, Sides, Terms, moments
from d3pack.backbones import open_backbone
from d3pack.encode import D3MSettings
from d3pack.encode.methods.d3m.method import round_trip
from d3pack.sources import open_source
from d3pack.system import Journal

SHORT = D3MSettings(steps=40, cool=30, batch=12, triples=8, pool=16)


def points(*losses: float, seconds: tuple[str, str] = ("inversion", "latents")) -> list[Point]:
    """A curve of a second of each kind in every 80 samples."""
    return [
        {"samples": 80 * i, "loss": loss, "seconds": dict.fromkeys(seconds, float(i))}
        for i, loss in enumerate(losses)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Terms]:
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_sd(folder / "sd")
    for split in ("train", "test"):
        make_tree(folder / "photos" / split)
    terms = Terms(
        backbone=str(folder / "sd"),
        classes=3,
        examined=1,
        peer_steps=40,
        triples=32,
        teacher_samples=100,
        own=SHORT,
    )
    return folder, terms


def opened(folder: Path, terms: Terms, work: Path) -> Sides:
    train, test = (open_source(folder / "photos", split=split) for split in ("train", "test"))
    return Sides(train, test, terms, work)


def test_hit_is_the_first_judgement_not_the_best() -> None:
    curve = points(4.0, 3.0, 3.5, 2.0, 1.0, 2.5)
    hits = [first_hit(curve, loss) for loss in (4.0, 3.0, 2.9, 1.0)]
    assert [hit and hit["samples"] for hit in hits] == [0, 80, 240, 320]
    assert first_hit(curve, 0.5) is None
    assert late(curve) == pytest.approx((3.0 + 3.5 + 2.0 + 1.0 + 2.5) / 5)


def test_race_takes_the_first_hit_of_either_side_and_the_earlier_run_of_the_peer() -> None:
    ours = points(4.0, 3.0, 2.0, 2.5, seconds=("inversion", "judging"))
    peer = {"0.002": points(4.0, 3.9, 1.9, 2.2), "0.0006": points(4.0, 3.5, 3.0, 2.2, 2.1)}
    once = {"teacher": 3.0, "collages": 2.0, "latents": 1.0}
    found = race(3.0, ours, peer, once)
    assert (found["ours"]["samples"], found["peer"]["samples"]) == (80, 160)
    assert found["peer"]["rate"] == "0.002", "the first of two that need as many"
    assert found["times"] == {"samples": 2.0, "inversion": 2.0, "judged": 1.33, "all": 0.5}
    never = race(1.95, ours, peer, once)
    assert never["ours"] is None
    assert never["peer"]["samples"] == 160
    assert "times" not in never
    assert "times" not in race(4.0, ours, peer, once), "both begin there"


def test_all_costs_count_for_ours() -> None:
    mine = {"samples": 10, "seconds": {"inversion": 2.0, "judging": 1.0}}
    theirs = {"samples": 40, "seconds": {"inversion": 8.0, "latents": 12.0}}
    found = times(mine, theirs, {"teacher": 4.0, "collages": 2.0, "latents": 1.0})
    assert found == {"samples": 4.0, "inversion": 4.0, "judged": 5.0, "all": 2.0}


def test_moments_are_as_far_apart_for_both_sides() -> None:
    peer = list(range(0, 12_001, 80))
    ours = [0, *range(20, 1150, 40), 1180]
    chosen = [peer[i] for i in moments(peer)]
    assert chosen[:21] == peer[:21]
    assert set(np.diff(chosen[20:])) == {400}
    assert chosen[-1] == 12_000
    judged = [ours[i] for i in moments(ours)]
    assert set(np.diff(judged[:-1])) == {80, 100}
    assert judged[-1] == ours[-1]


def test_tuning_class_is_not_examined() -> None:
    drawn = [Terms(seed=seed).drawn() for seed in range(20)]
    assert all(len(set(classes)) == 4 for classes in drawn)
    assert len({tuple(classes) for classes in drawn}) > 10


def test_peer_moves_its_own_row_alone_and_goes_on_as_if_never_stopped(
    world: tuple[Path, Terms], tmp_path: Path
) -> None:
    backbone = open_backbone(str(world[0] / "sd"))
    start = encode_peer.start_vector(backbone, "lemon")
    images = torch.randint(256, (4, 3, *backbone.image_size), dtype=torch.uint8)

    def made() -> Peer:
        return Peer(backbone, start, images, "a photo of a {}", 2e-3, 5)

    with closing(Journal(tmp_path / "one", {})) as journal:
        whole = peer_trace(journal, "peer/x", made(), 9, 3)
    with closing(Journal(tmp_path / "two", {})) as journal:
        peer_trace(journal, "peer/x", made(), 6, 3)
        resumed = made()
        stopped = peer_trace(journal, "peer/x", resumed, 9, 3)
    assert whole["samples"].tolist() == [0, 12, 24, 36]
    assert np.array_equal(whole["vectors"], stopped["vectors"])
    assert (np.diff(stopped["seconds"]) > 0).all()
    assert (stopped["encoding"] <= stopped["seconds"]).all()
    assert not np.array_equal(whole["vectors"][0], whole["vectors"][-1])
    table = resumed._table.detach()
    assert torch.equal(table[:-1], backbone.text.table.detach())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_stopped_examination_goes_on_to_the_same_figures(
    world: tuple[Path, Terms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, terms = world
    photos = folder / "photos"
    monkeypatch.setattr(encode, "RATES", (6e-4, SCRIPT["rate"], 6e-3))

    def losses(figures: dict[str, Any]) -> list[Any]:
        return [
            [
                [(p["samples"], p["loss"]) for p in curve]
                for curve in (one["ours"], *one["peer"].values())
            ]
            for one in figures["sets"]["first"]["classes"]
        ]

    whole = encode.examine(terms, photos, photos, tmp_path / "whole")
    learn, calls = Peer.learn, 0

    def stops(self: Peer, steps: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        learn(self, steps)

    monkeypatch.setattr(Peer, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        encode.examine(terms, photos, None, tmp_path / "stopped")
    monkeypatch.setattr(Peer, "learn", learn)
    figures = encode.examine(terms, photos, None, tmp_path / "stopped")
    assert losses(figures) == losses(whole)
    assert set(whole["sets"]) == {"first", "second"}
    text = readme.learning(whole)
    assert "takes 160 samples a class" in text
    monkeypatch.setattr(many, "load", {"encode": whole}.__getitem__)
    assert many.samples_each() == whole["sets"]["first"]["ours_all_classes"]["samples"] / 3
    assert text.count("| photos | ") == 4
    assert "examined once" in text
    assert "examined once" not in readme.learning(figures)

    first = whole["sets"]["first"]
    names = {one["class"] for one in first["classes"]}
    assert len(names) == 1
    assert whole["tuning"]["class"] not in names
    rates = [row["rate"] for row in whole["tuning"]["grid"]]
    assert SCRIPT["rate"] in rates
    assert (
        whole["tuning"]["rate"]
        == min(whole["tuning"]["grid"], key=lambda r: r["late_loss"])["rate"]
    )
    for one in first["classes"]:
        assert {f"{SCRIPT['rate']:g}", f"{whole['tuning']['rate']:g}"} == set(one["peer"])
        assert [p["samples"] for p in next(iter(one["peer"].values()))] == [0, 80, 160]
        assert one["to"]["our end"]["ours"]["loss"] <= one["ours"][-1]["loss"]
        assert one["to"]["peer's end"]["loss"] == min(c[-1]["loss"] for c in one["peer"].values())
        assert set(one["ours"][-1]["seconds"]) == {"inversion", "judging"}
        assert one["ours"][-1]["seconds"]["judging"] > 0
        assert one["ours"][-1]["validated"] > 0
    seconds = first["ours_all_classes"]["seconds"]
    assert set(seconds) == {"teacher", "collages", "latents", "judging", "inversion"}
    assert min(seconds.values()) > 0


def test_ours_is_examined_as_the_pack_holds_it(world: tuple[Path, Terms], tmp_path: Path) -> None:
    folder, terms = world
    with closing((sides := opened(folder, terms, tmp_path / "work")).journal):
        assert sides.codec == "i4"
        curve = sides.our_curve(1)
        trace = sides.journal.load("ours/000001")
        assert trace is not None
        stored = trace[0]["vectors"]
        again = round_trip("i4")(stored)
        assert np.allclose(stored, again, atol=1e-6)
        exam = sides.exam(1)
        assert curve[-1]["loss"] == round(exam.loss(stored[-1]), 6)
        seen, held = (sides.journal.load(f"{name}/000001") for name in ("collages", "exams"))
        assert seen is not None
        assert held is not None
        assert len(seen[0]["images"]) == len(held[0]["images"]) == 16


def test_rules_of_the_shared_part_differ_after_the_same_start(
    world: tuple[Path, Terms], tmp_path: Path
) -> None:
    folder, terms = world
    figures = encode_shared.compared(folder / "photos", terms, tmp_path)
    assert encode_shared.compared(folder / "photos", terms, tmp_path) == figures
    rules = figures["rules"]
    assert set(rules) == {"agreed", "always", "never"}
    assert len({rule["start_loss"] for rule in rules.values()}) == 1
    assert len({rule["loss"] for rule in rules.values()}) == 3
    for rule in rules.values():
        curves = rule["curves"].values()
        assert all(curve[0][0] == 0 for curve in curves)
        assert sum(curve[-1][0] for curve in curves) <= rule["samples"]
        ends = [curve[-1][1] for curve in curves]
        assert rule["loss"] == pytest.approx(sum(ends) / len(ends), abs=1e-6)
        assert rule["least_gain"] <= rule["start_loss"] - rule["loss"]
    with closing((sides := opened(folder, terms, tmp_path)).journal):
        ours = {c: sides.our_curve(c)[-1]["loss"] for c in range(3)}
    assert ours == {c: curve[-1][1] for c, curve in enumerate(rules["agreed"]["curves"].values())}


def test_work_of_other_terms_is_refused(world: tuple[Path, Terms], tmp_path: Path) -> None:
    folder, terms = world
    with closing(opened(folder, terms, tmp_path).journal) as journal:
        assert set(journal.key["own"]) == {each.name for each in fields(D3MSettings)}
    sides = opened(folder, replace(terms, examined=2), tmp_path)
    with closing(sides.journal):
        sides.journal.record("begun", True)
    with pytest.raises(Exception, match="peer_steps was 40"):
        opened(folder, replace(terms, peer_steps=8), tmp_path)


def test_readme_says_who_never_hits_and_both_races() -> None:
    once = {"teacher": 3.0, "collages": 2.0, "latents": 1.0}
    curves = [
        (points(4.0, 3.0, 2.0, seconds=("inversion", "judging")), points(4.0, 3.9, 3.5, 3.0)),
        (points(4.0, 3.9, 3.8, 3.7, seconds=("inversion", "judging")), points(4.0, 3.7, 3.5)),
    ]
    classes = []
    for ours, peer in curves:
        ends = {"peer's end": peer[-1]["loss"], "our end": ours[-1]["loss"]}
        classes.append(
            {"to": {end: race(loss, ours, {"0.002": peer}, once) for end, loss in ends.items()}}
        )
    assert list(readme.learning_rows({"name": "cifar10", "classes": classes})) == [
        "| CIFAR-10 | textual inversion | 1 of 2 | 2 of 2 | 3.0 | 3.0 | 2.0 | 0.8 |",
        "| CIFAR-10 | `encode` | 2 of 2 | 1 of 2 | 0.3 | 0.3 | 0.3 | 0.2 |",
    ]
    nobody = {"ours": None, "peer": None}
    never = [{"to": {"peer's end": nobody, "our end": nobody}}]
    row = next(readme.learning_rows({"name": "x", "classes": never}))
    assert row == "| x | textual inversion | 0 of 1 | 0 of 1 | - | - | - | - |"
