"""A budget in bytes for the methods whose prompts are rows of a class table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encode_world import make_tree
from tiny_backbones import tiny_dit

from d3pack.encode import EncodeOptions, dry_run, encode, open_method
from d3pack.encode.budget import MARGIN
from d3pack.encode.search import STEPS
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
    "extra": {"preset": "tiny", "search_images": 12, "train_steps": 4},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(make_tree(tmp_path_factory.mktemp("budget") / "source", 8)))


def test_classcond_buys_what_fits(source: Source, tmp_path: Path) -> None:
    bare = EncodeOptions(codec="i4", candidates=1, labels="none", probes=0, **CLASSCOND)
    least = dry_run(source, bare)["bytes"] + MARGIN
    chosen = []
    for budget in (least, 6_500):
        output = tmp_path / f"{budget}.d3m"
        pack = encode(source, EncodeOptions(budget=budget, **CLASSCOND), output)
        assert len(pack_bytes(pack)) <= budget
        chosen.append((pack.prompts.codec, pack.picks is not None, pack.probes is not None))
        assert f"budget {budget:,} bytes: " in (tmp_path / f"{budget}.d3m.work/log.txt").read_text()
    assert chosen[0][1:] == (False, False)
    assert chosen[1] == ("f16", True, True)
    with pytest.raises(UsageError, match="2000 bytes are too few"):
        encode(source, EncodeOptions(budget=2_000, **CLASSCOND), tmp_path / "none.d3m")


def test_a_carried_backbone_counts(source: Source) -> None:
    extra = {**CLASSCOND["extra"], "embed": True}
    options = {**CLASSCOND, "extra": extra}
    with pytest.raises(UsageError, match="too few"):
        dry_run(source, EncodeOptions(budget=1_000_000, **options))
    found = dry_run(source, EncodeOptions(budget=4_000_000, **options))
    assert 1_500_000 < found["bytes"] <= 4_000_000


def test_minimax_stores_its_adapter_more_coarsely_before_it_gives_up(
    source: Source, tmp_path: Path
) -> None:
    tiny_dit(tmp_path / "dit")
    extra = {"train_steps": 3, "batch": 4}

    def options(**changes: Any) -> EncodeOptions:
        values = {
            "method": "minimax",
            "backbone": str(tmp_path / "dit"),
            "images_per_class": 3,
            "group": 4,
            "teacher_samples": 200,
            "sampler_steps": 2,
            "extra": extra,
        }
        return EncodeOptions(**{**values, **changes})

    plain = options(codec="i4", candidates=1, labels="none", probes=0)
    fine, coarse = (
        dry_run(source, options(**{**plain.plain(), "extra": {**extra, "adapter": codec}}))["bytes"]
        for codec in ("f16", "i8")
    )
    assert coarse < fine - 1_000
    budget = (fine + coarse) // 2 + 200
    pack = encode(source, options(budget=budget), tmp_path / "small.d3m")
    assert len(pack_bytes(pack)) <= budget
    assert pack.adapter is not None
    assert pack.adapter.codec == "i8"
    with pytest.raises(UsageError, match="too few"):
        dry_run(source, options(budget=budget, extra={**extra, "adapter": "f16"}))
    roomy = open_method("minimax").plan(source, options(budget=10 * fine), "cpu").to_json()
    assert roomy["settings"]["adapter"] == "f16"
    assert roomy["dials"]["candidates"] > 1


def test_classcond_of_one_image_a_class(tmp_path: Path) -> None:
    """No distance can be measured: the cheapest sampler is taken."""
    lonely = open_source(str(make_tree(tmp_path / "lonely", 1)))
    options = {**CLASSCOND, "sampler_steps": None, "guidance": None}
    pack = encode(lonely, EncodeOptions(**options), tmp_path / "lonely.d3m")
    assert len(pack.recipe.sigmas) == 1 + min(STEPS)
    assert pack.recipe.guidance == 1.0
