"""Every command of the README is run, and every link of it leads somewhere."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli import invoke
from encode_world import CLASSES, make_tree
from PIL import Image
from places import ROOT

import d3pack
from d3pack.students.protocols import PROTOCOLS, QUICK, Updates

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What the README leaves to the defaults takes minutes; the same verbs, with less to do.
SHORTER = {
    "encode": "--steps 2 --cool 1 --batch 12 --sampler-steps 2 --probes 2 --teacher-samples 60"
    " --candidates 2 --guidance 2",
    "eval": "--seeds 1 --baseline random",
}
SETUP = {
    "pip install -c constraints.txt '.[all]' && d3pack demo",
    "pip install -c constraints.txt '.[test]' && pytest -m \"not slow\"",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_set_up_is_two_commands_and_the_gate_runs_the_second() -> None:
    assert set(commands()[:2]) == SETUP
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -c constraints.txt '.[test]' && pytest -m \"not slow\"" in gate


@pytest.mark.e2e
def test_commands_in_order_then_the_python_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PROTOCOLS, "quick", replace(QUICK, length=Updates(3)))
    make_tree(tmp_path / "photos" / "train", count=12, classes=CLASSES[:2])
    make_tree(tmp_path / "photos" / "test", count=4, classes=CLASSES[:2])
    for line in commands()[2:]:
        program, verb, *words = shlex.split(line)
        assert program == "d3pack", line
        done = invoke(verb, *words, *SHORTER.get(verb, "").split())
        assert done.exit_code == 0, f"{line}: {done.exception} {done.stderr}"
    assert (tmp_path / "worth.html").stat().st_size > 10_000
    assert "<img" in (tmp_path / "photos.html").read_text(encoding="utf-8")
    decoded = sorted((tmp_path / "images").rglob("*.png"))
    assert len(decoded) == 2 * 50
    block = next(text for text in blocks("python") if "DataLoader" in text)
    names: dict[str, object] = {}
    exec(block, names)  # the README's own lines, as a reader would paste them
    assert np.array_equal(
        np.asarray(names["dataset"][0][0]).transpose(1, 2, 0),  # type: ignore[index]
        np.asarray(Image.open(decoded[0])),
    )


def test_every_figure_comes_from_a_committed_result() -> None:
    from benchmarks import readme

    for path, made in readme.blocks().items():
        assert made in path.read_text(encoding="utf-8"), "run: python -m benchmarks readme"


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_the_packs_behind_the_smallest_rows_are_here(name: str) -> None:
    results = ROOT / "benchmarks" / "results"
    table = json.loads((results / f"table-{name}.json").read_text(encoding="utf-8"))["figures"]
    pack = d3pack.read(results / f"table-{name}-6000.d3m")
    # measured in an earlier container, which took more bytes for the same images
    rewritten = table["packs"]["6000"]["rewritten"]
    assert pack.root == rewritten["root"]
    assert pack.ledger().total == rewritten["bytes"] < table["rows"]["pack 6,000 B"]["bytes"]
    measured = table["packs"]["6000"]["ledger"]["sections"]
    for section in ("classes", "prompts", "picks"):
        assert pack.ledger().sections[section] == measured[section]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
