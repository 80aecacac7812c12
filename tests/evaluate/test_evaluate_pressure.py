"""An evaluation on a disk that is full, then has a little more room, then more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from encode_world import make_tree
from evaluate_world import BLINK, figures
from full_disk import Disk, disk
from tiny_backbones import tiny_pack, tiny_sd

from d3pack.errors import NoSpaceError
from d3pack.evaluate import EvalSettings, Evaluation, evaluate, teacher
from d3pack.format import write

__all__ = ["disk"]
pytestmark = pytest.mark.slow


def test_an_evaluation_goes_on_when_there_is_room(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students, pilots, the teacher and the report are written; none is lost or half there."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(teacher, "SAMPLES", 200)
    pack = tiny_pack(tiny_sd(tmp_path / "backbone"), images=4, steps=1, guidance=1.0)
    ref = replace(pack.recipe.backbone, repo="org/tiny")  # its bytes are not sent
    pack = replace(pack, recipe=replace(pack.recipe, backbone=ref))
    write(pack, tmp_path / "pack.d3m")
    for split, count in (("train", 8), ("test", 4)):
        make_tree(tmp_path / "real" / split, count, pack.classes)
    settings = EvalSettings(
        backbone=str(tmp_path / "backbone"),
        baselines=("random", "webp", "chosen"),
        seeds=2,
        teacher="train",
    )

    def made(work: Path) -> Evaluation:
        return evaluate(
            tmp_path / "pack.d3m", tmp_path / "real", settings, work=work, protocol=BLINK
        )

    found: list[Evaluation] = []

    def error() -> BaseException | None:
        monkeypatch.setenv("D3PACK_HOME", str(disk.path / "home"))
        try:
            found.append(made(disk.path / "work"))
        except NoSpaceError as error:
            return error
        return None

    assert disk.grow_until(error) > 0
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    assert figures(found[-1]) == figures(made(tmp_path / "work"))
    stored = json.loads((disk.path / "work" / "evaluation.json").read_text(encoding="utf-8"))
    assert len(stored["entries"]) == len(found[-1].results)
