"""The benchmark of other students: the same training sets, and nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encode_world import make_tree
from evaluate_world import BLINK
from tiny_backbones import tiny_pack, tiny_sd

from benchmarks import across, readme
from benchmarks.results import load
from d3pack.evaluate import Bench, teacher
from d3pack.evaluate.baselines import AVIF_SHEET
from d3pack.evaluate.entries import PayloadSettings
from d3pack.format import write
from d3pack.students import PROTOCOLS


def row(mean: float, std: float, **about: Any) -> dict[str, Any]:
    return {**about, "last": {"mean": mean, "std": std}, "runs": [{}] * 3}


def test_margins_need_both_rows() -> None:
    rows = {
        "vit6, pack, 6,000 B": row(0.5, 0.01, student="vit6", arm="pack", budget=6000),
        "vit6, photographs, 6,000 B": row(
            0.4, 0.02, student="vit6", arm="photographs", budget=6000
        ),
        "resnet18, pack, 6,000 B": row(0.6, 0.01, student="resnet18", arm="pack", budget=6000),
    }
    assert across.margins(rows) == [
        "vit6           6,000 B: 50.0 ± 1.0 against 40.0 ± 2.0 %: +10.0"
    ]


def test_readme_has_the_students_of_both_rows() -> None:
    rows = {
        "a": row(0.5, 0.01, student="vit6", arm="pack", budget=6000),
        "vit6, photographs, 6,000 B": row(
            0.4, 0.02, student="vit6", arm="photographs", budget=6000
        ),
        "b": row(0.6, 0.01, student="resnet18", arm="pack", budget=6000),
    }
    for found in rows.values():
        found |= {"runs": [{"updates": 300}] * 3, "bytes": 5000.0}
    text = readme.across({"protocol": "quick", "rows": rows})
    assert "| ViT of 6 blocks | 5,000 B | 50.0 ± 1.0 % | 5,000 B | 40.0 ± 2.0 % | +10.0 |" in text
    assert "ResNet-18" not in text
    assert "300 updates" in text
    assert readme.across({}) == readme.ACROSS_NOT_YET
    larger = {"student": "resnet18", "budget": 30_000, "runs": [{"updates": 300}] * 3}
    both = {
        **rows,
        "c": row(0.6, 0.01, arm="pack", bytes=29_000.0) | larger,
        "resnet18, photographs, 30,000 B": row(0.7, 0.01, arm="photographs", bytes=28_000.0)
        | larger,
    }
    text = readme.other_students({"rows": both})
    assert "300\nupdates, 3 networks of each" in text
    assert text.endswith(
        "\n| network | pack 5,000 B, photographs 5,000 B | pack 29,000 B, photographs 28,000 B |"
        "\n|---|---:|---:|"
        "\n| ViT of 6 blocks | +10.0 ± 2.2 | - |"
        "\n| ResNet-18 (stem of CIFAR) | - | -10.0 ± 1.4 |"
        "\n\nFor ResNet-18 (stem of CIFAR), packs of 30 kB are not ahead by more than that"
        " deviation."
    )
    assert readme.other_students({}) == ""


def test_photographs_have_the_settings_of_the_committed_table() -> None:
    chosen, settings = across.tuned("cifar10-standard", 30_000, 32)
    assert chosen
    assert str(settings) == "AVIF sheet q25 24 px"


def test_the_best_photographs_of_the_table_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def photographs(arm: str, mean: float, payload: str, budget: int = 6000) -> dict[str, Any]:
        return row(mean, 0.0, arm=arm, budget=budget, detail={"payload": payload})

    rows = {
        "a": photographs("chosen", 0.4, "AVIF sheet q10 16 px"),
        "b": photographs("avif", 0.5, "AVIF sheet q25 24 px"),
        "c": photographs("avif", 0.9, "AVIF sheet q60 24 px", 30_000),
        "d": photographs("pack", 0.9, ""),
    }
    monkeypatch.setattr(across, "load", lambda _: {"rows": rows})
    chosen, settings = across.tuned("x", 6000, 32)
    assert not chosen
    assert str(settings) == "AVIF sheet q25 24 px"


@pytest.mark.heavy
def test_every_student_learns_from_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(across, "RESULTS", tmp_path)
    monkeypatch.setattr(teacher, "SAMPLES", 60)
    monkeypatch.setitem(PROTOCOLS, "standard", BLINK)
    pack = tiny_pack(tiny_sd(tmp_path / "sd"), images=4)
    for part, count in (("train", 12), ("test", 5)):
        make_tree(tmp_path / "real" / part, classes=pack.classes, count=count)
    (tmp_path / "packs").mkdir()
    write(pack, tmp_path / "packs" / "toy-2000.d3m")
    settings = PayloadSettings(AVIF_SHEET, 25, 16)
    monkeypatch.setattr(across, "tuned", lambda *_: (True, settings))
    words = f"toy --real {tmp_path}/real --work {tmp_path}/work --packs {tmp_path}/packs"
    words += f" --backbone {tmp_path}/sd --budgets 2000 --students convnet3,vit6"
    across.main([*words.split(), "--seeds", "1"])
    across.main([*words.split(), "--seeds", "2"])
    rows = load(tmp_path / "across-toy.json")["rows"]
    assert set(rows) == {
        f"{student}, {arm}, 2,000 B"
        for student in ("convnet3", "vit6")
        for arm in ("pack", "photographs")
    }
    for name, found in rows.items():
        assert [run["student"] for run in found["runs"]] == [name.partition(",")[0]] * 2
        assert all(len(run["curve"]) == 1 for run in found["runs"])
        assert found["bytes"] <= 2000
    others = PayloadSettings(AVIF_SHEET, 50, 16)
    monkeypatch.setattr(across, "tuned", lambda *_: (True, others))
    across.main([*words.split(), "--seeds", "2"])
    for name, each in load(tmp_path / "across-toy.json")["rows"].items():
        assert (each == rows[name]) == (each["arm"] == "pack"), "photographs are compressed anew"
        assert len(each["runs"]) == 2
    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("it is there"))
    across.main([*words.split(), "--seeds", "2"])
