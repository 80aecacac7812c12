"""Prompts that make in one pass of the model what guidance makes in two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encode_world import make_tree, quick

from d3pack.decode import Decoder
from d3pack.encode import encode, estimate_encode, sampler_fit
from d3pack.encode.allocation import MARGIN
from d3pack.encode.methods.d3m import one_pass
from d3pack.errors import UsageError
from d3pack.format import Pack, decode_prompts

pytestmark = pytest.mark.usefixtures("long_pilot")  # whether a prompt gains here is close

ALONE = {"candidates": 1, "labels": "none", "guidance": 1.5}
STAGE = "fit prompts to one pass"


@pytest.fixture(autouse=True)
def few_images_to_fit_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the time; how near a fitted sampler comes is tested apart, with all images."""
    monkeypatch.setattr(sampler_fit, "MOST", 12)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that takes little time: where it leads is for another test."""
    monkeypatch.setattr(one_pass, "STATES", 12)
    monkeypatch.setattr(one_pass, "ROUNDS", 2)


class StopError(Exception):
    """As a kill would."""


def facts(output: Path) -> dict[str, object]:
    journal = json.loads((output.with_name(output.name + ".work") / "journal.json").read_text())
    kept: dict[str, object] = journal["facts"]
    return kept


@pytest.mark.slow
def test_images_are_nearer_to_guided_ones_than_without_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "STATES", 40)  # a third of the time
    source = make_tree(tmp_path / "source", 4, ("king penguin", "school bus"))
    settings = quick(
        Path("mini"),
        modes=1, candidates=1, labels="none", steps=0, cool=0, images_per_class=8,
        sampler_steps=None, guidance=2.5,
    )  # fmt: skip
    cache = tmp_path / "cache"

    def made(name: str, **changes: object) -> tuple[Pack, torch.Tensor]:
        own = replace(settings.method_settings, **changes)
        guidance = 1.0 if name == "plain" else 2.5
        changed = replace(settings, method_settings=own, guidance=guidance)
        pack = encode(source, tmp_path / f"{name}.d3m", changed, teachers=cache)
        return pack, Decoder(pack).images(range(len(pack))).float()

    guided, target = made("guided")
    pack, images = made("one-pass", one_pass=True)
    _, plain = made("plain")
    assert guided.recipe.guidance == 2.5
    assert pack.recipe.guidance == 1.0
    assert pack.recipe.sampler == "table"
    assert pack.recipe.extra["table"] != guided.recipe.extra["table"]
    assert (images - target).square().mean() < 0.6 * (plain - target).square().mean()
    log = (tmp_path / "one-pass.d3m.work" / "log.txt").read_text(encoding="utf-8")
    assert "one pass instead of guidance 2.5: prompts carry" in log


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("condition", ["tokens", "outputs"])
def test_the_size_is_known_before_and_nothing_of_guidance_is_left(
    home: Path, tmp_path: Path, condition: str
) -> None:
    # four bits a value would hide the smallest moves
    how = {"condition": condition, "modes": 2, "codec": "f16", **ALONE}
    settings = quick(home / "sd", one_pass=True, **how)
    said = estimate_encode(home / "source", settings)
    assert "guidance 1.5 in one pass" in " ".join(said["lines"])
    assert said["seconds"]["one pass"] > 0
    output = tmp_path / "x.d3m"
    pack = encode(home / "source", output, settings)
    assert abs(output.stat().st_size - said["bytes"]) < MARGIN
    assert (pack.recipe.guidance, pack.unconditional) == (1.0, None)
    guided = encode(
        home / "source",
        tmp_path / "guided.d3m",
        quick(home / "sd", **how),
    )
    assert guided.recipe.guidance == 1.5
    assert (guided.unconditional is not None) == (condition == "outputs")
    assert pack.prompts is not None
    assert guided.prompts is not None
    moved = (decode_prompts(pack.prompts) != decode_prompts(guided.prompts)).any((2, 3))
    assert moved.all(), "each prompt of each class is fitted"


@pytest.mark.usefixtures("short")
def test_an_interrupted_fit_leads_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    settings = quick(home / "sd", one_pass=True, sampler_steps=None, fitted_steps=3, **ALONE)
    encode(home / "source", tmp_path / "whole.d3m", settings)
    kept = facts(tmp_path / "whole.d3m")
    assert kept["sampler/1.5"] != kept["sampler/one-pass"]

    def stop(event: dict[str, object]) -> None:
        if event.get("event") == "step" and event.get("stage") == STAGE:
            raise StopError

    steps: list[object] = []

    def count(event: dict[str, object]) -> None:
        if event.get("event") == "step" and event.get("stage") == STAGE:
            steps.append(event["done"])

    with pytest.raises(StopError):
        encode(home / "source", tmp_path / "cut.d3m", settings, listeners=[stop])
    pack = encode(home / "source", tmp_path / "cut.d3m", settings, listeners=[count])
    assert steps[0] == 2, "the first prompt was kept"
    assert (tmp_path / "cut.d3m").read_bytes() == (tmp_path / "whole.d3m").read_bytes()
    assert len(steps) == len(pack.classes) * 2 - 1


def test_what_has_no_guidance_or_fresh_noise_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one_pass needs guidance"):
        encode(
            home / "source",
            tmp_path / "x.d3m",
            quick(home / "sd", one_pass=True, **{**ALONE, "guidance": 1.0}),
        )
    with pytest.raises(UsageError, match="one_pass excludes the sampler lcm"):
        encode(
            home / "source",
            tmp_path / "x.d3m",
            quick(home / "sd", one_pass=True, sampler="lcm", **ALONE),
        )
