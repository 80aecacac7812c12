"""The example of a backbone, and the packs that come with the project."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import ROOT
from tiny_backbones import tiny_pack

import d3pack
from benchmarks import gallery, readme
from benchmarks.results import load
from d3pack.backbones import kinds, lock_directory, mini_directory
from d3pack.decode import Decoder, verify_probes

PACKS = sorted((ROOT / "examples").glob("*.d3m"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """custom_backbone.py as a package that somebody installed."""
    info = tmp_path / "site" / "grey-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: grey\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[d3pack.backbones]\ngrey-stable-diffusion = custom_backbone:Grey\n"
    )
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kinds.cache_clear()
    yield
    kinds.cache_clear()
    sys.modules.pop("custom_backbone", None)


@pytest.mark.heavy
@pytest.mark.usefixtures("installed")
def test_a_backbone_of_ones_own_makes_grey_images() -> None:
    path = mini_directory()
    coloured = Decoder(tiny_pack(path), path=path).images(range(3))
    ref = lock_directory(path, kind="grey-stable-diffusion")
    pack = tiny_pack(path)
    pack = replace(pack, recipe=replace(pack.recipe, backbone=ref))
    grey = Decoder(pack, path=path).images(range(3))
    assert (grey == grey[:, :1]).all()
    assert not (coloured == coloured[:, :1]).all()
    assert grey.float().std() > 1


def test_there_are_two_packs() -> None:
    assert [path.stem for path in PACKS] == ["cifar10", "fashion-mnist"]


@pytest.mark.heavy
@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_packs_decode_on_the_embedded_backbone(path: Path) -> None:
    pack = d3pack.read(path)
    assert pack.recipe.backbone.repo == "mini"
    assert len(pack.classes) == 10
    report = verify_probes(pack, Decoder(pack))
    assert report.verdict in {"exact", "within tolerance"}
    card = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert f"{pack.ledger().total:,} bytes" in card
    assert pack.root[:16] in card


def test_cards_are_those_of_the_packs() -> None:
    text = gallery.README.read_text(encoding="utf-8")
    assert gallery.block() in text, "run: python -m benchmarks gallery"
    for path in PACKS:
        assert path.with_suffix(".webp").is_file()


def test_card_has_the_figures_that_were_measured_with_the_pack() -> None:
    pack = d3pack.read(ROOT / "benchmarks" / "results" / "table-cifar10-6000.d3m")
    rows = load("table-cifar10")["rows"]
    said = gallery.worth(pack)
    assert readme.percent(rows["pack 6,000 B"]) in said
    assert readme.percent(readme.best(rows, 6000, "chosen", "collages")) in said
    assert "table-cifar10.json" in said
    assert "was not measured" in gallery.worth(pack.first(1))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "path",
    [PACKS[0], pytest.param(PACKS[1], marks=pytest.mark.slow)],
    ids=lambda path: path.stem,
)
def test_lines_of_a_card_run_as_they_are_shown(path: Path, tmp_path: Path) -> None:
    """With ten images of the pack, in a folder where the pack has the same name."""
    (tmp_path / "examples").mkdir()
    d3pack.write(d3pack.read(path).first(1), tmp_path / "examples" / path.name)
    card = gallery.card(path)
    (command,) = re.findall(r"```sh\n(.*?)  #", card)
    codes = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(codes) == 4
    if find_spec("lightning") is None:
        codes = codes[:-1]
    check = "for code in codes: names = {}; exec(code, names); print(len(names['data']), 'images')"
    env = os.environ | {
        "D3PACK_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    for words in (
        ["-m", *shlex.split(command)],
        ["-c", f"codes = {codes!r}\n{check}"],
    ):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 images") == len(codes)


def test_the_picture_of_the_readme_says_what_its_pack_weighs() -> None:
    face = (ROOT / "README.md").read_text(encoding="utf-8")
    weight = (ROOT / "examples" / "cifar10.d3m").stat().st_size / 1000
    assert f"made from a pack of {weight:.1f} kB, ten of each class" in face
