"""A budget in bytes for the methods whose prompts are rows of a class table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from encode_world import changed, make_tree, settings_of
from tiny_backbones import tiny_dit

from d3pack.encode import EncodeSettings, encode, estimate_encode
from d3pack.encode.sampler_search import STEPS
from d3pack.errors import UsageError
from d3pack.format import pack_bytes
from d3pack.sources import Source, open_source

CLASSCOND: dict[str, Any] = {
    "method": "classcond",
    "images_per_class": 3,
    "group": 4,
    "teacher_samples": 200,
    "sampler_steps": 2,
    "guidance": 1.0,
    "model": "tiny",
    "search_images": 12,
    "train_steps": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(make_tree(tmp_path_factory.mktemp("budget") / "source", 8)))


@pytest.mark.heavy
def test_classcond_spends_a_budget_on_what_fits(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="500 bytes are too few") as caught:
        encode(source, tmp_path / "none.d3m", settings_of(budget=500, **CLASSCOND))
    found = re.search(r"the smallest pack of these classes has (\d+)", str(caught.value))
    assert found
    least = int(found[1])
    chosen = []
    for budget in (least, 6_500):
        output = tmp_path / f"{budget}.d3m"
        pack = encode(source, output, settings_of(budget=budget, **CLASSCOND))
        assert len(pack_bytes(pack)) <= budget
        assert pack.prompts is not None
        chosen.append((pack.prompts.codec, pack.picks is not None, pack.probes is not None))
        assert f"budget {budget:,} bytes: " in (tmp_path / f"{budget}.d3m.work/log.txt").read_text()
    assert chosen[0][1:] == (False, False)
    assert chosen[1] == ("f16", True, True)
    with pytest.raises(UsageError, match=f"{least - 1} bytes are too few"):
        encode(source, tmp_path / "none.d3m", settings_of(budget=least - 1, **CLASSCOND))


def test_embedded_backbone_counts_against_the_budget(source: Source) -> None:
    with pytest.raises(UsageError, match="too few"):
        estimate_encode(source, settings_of(budget=1_000_000, embed=True, **CLASSCOND))
    estimate = estimate_encode(source, settings_of(budget=4_000_000, embed=True, **CLASSCOND))
    assert 1_500_000 < estimate["bytes"] <= 4_000_000


@pytest.mark.heavy
def test_minimax_stores_a_coarser_adapter_where_the_budget_needs_it(
    source: Source, tmp_path: Path
) -> None:
    tiny_dit(tmp_path / "dit")

    def settings(**changes: Any) -> EncodeSettings:
        values = {
            "method": "minimax",
            "backbone": str(tmp_path / "dit"),
            "images_per_class": 3,
            "group": 4,
            "teacher_samples": 200,
            "sampler_steps": 2,
            "train_steps": 3,
            "batch": 4,
        }
        return settings_of(**{**values, **changes})

    smallest = settings(codec="i4", candidates=1, labels="none", probes=0)
    fine, coarse = (
        estimate_encode(source, changed(smallest, adapter=codec))["bytes"]
        for codec in ("f16", "i8")
    )
    assert coarse < fine - 1_000
    budget = (fine + coarse) // 2 + 200
    pack = encode(source, tmp_path / "small.d3m", settings(budget=budget))
    assert len(pack_bytes(pack)) <= budget
    assert pack.adapter is not None
    assert pack.adapter.codec == "i8"
    with pytest.raises(UsageError, match="too few"):
        estimate_encode(source, settings(budget=budget, adapter="f16"))
    plan = estimate_encode(source, settings(budget=10 * fine))["plan"]
    assert plan["settings"]["adapter"] == "f16"
    assert plan["allocation"]["candidates"] > 1


@pytest.mark.heavy
def test_classcond_takes_the_cheapest_sampler_for_one_image_a_class(tmp_path: Path) -> None:
    """No distance can be measured."""
    lonely = open_source(str(make_tree(tmp_path / "lonely", 1)))
    settings = settings_of(**{**CLASSCOND, "sampler_steps": None, "guidance": None})
    pack = encode(lonely, tmp_path / "lonely.d3m", settings)
    assert len(pack.recipe.sigmas) == 1 + min(STEPS)
    assert pack.recipe.guidance == 1.0
