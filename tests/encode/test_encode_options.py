"""What a person asks for, what a budget buys, and what is shown meanwhile."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d3pack.cli.encode import encode
from d3pack.encode import EncodeOptions, budget, method, open_method
from d3pack.encode.complete import spread
from d3pack.encode.methods.d3m.method import D3M
from d3pack.encode.options import label_kind, parse_size
from d3pack.encode.plan import PICKY, SHARE, Dials
from d3pack.errors import D3MError, NoSpaceError, UsageError
from d3pack.sources import open_source
from d3pack.system.journal import JournalError

# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("20KB", 20_000), ("6000", 6000), ("1.5MB", 1_500_000), ("4 KiB", 4096)]
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "KB", "-3KB", "0", "5 potatoes", "1e400", "nanKB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_labels() -> None:
    assert label_kind("none") == ("none", 0)
    assert label_kind("dense") == ("dense", 0)
    assert label_kind("top5") == ("topk", 5)
    for text in ("top", "top0", "topx", "all"):
        with pytest.raises(UsageError):
            label_kind(text)


@pytest.mark.parametrize(
    "bad",
    [
        {"images_per_class": 0},
        {"images_per_class": 2**20 + 1},
        {"size": (0, 0)},
        {"modes": 0},
        {"codec": "zip"},
        {"factor": 3},
        {"sampler": "table"},
        {"template": "no place"},
        {"guidance": float("nan")},
        {"lr": 0.0},
        {"labels": "all"},
        {"crop_scale": (0.9, 0.1)},
        {"probes": 65},
        {"seed": -1},
        {"label_temperature": 0.0},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        EncodeOptions(**bad)  # type: ignore[arg-type]


def test_both_limits_are_said() -> None:
    with pytest.raises(UsageError, match="--ipc lies between 1 and 1048576"):
        EncodeOptions(images_per_class=2_000_000)


def test_the_command_has_the_defaults_of_the_options() -> None:
    said = {name: p.default for name, p in inspect.signature(encode).parameters.items()}
    said["images_per_class"], said["label_temperature"] = said["ipc"], said["temperature"]
    both = [field for field in fields(EncodeOptions) if field.name in said]
    assert len(both) > 30
    assert {f.name: said[f.name] for f in both} == {f.name: f.default for f in both}


def test_only_what_was_chosen_is_recorded() -> None:
    assert EncodeOptions().plain() == {}
    assert EncodeOptions(modes=2, lr=0.05).plain() == {"modes": 2, "lr": 0.05}


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"there is no method 'magic'; known: .*d3m"):
        open_method("magic")
    assert "d3m" in method.methods()


# -- probes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "count"), [(2, 6), (3, 16), (10, 8), (10, 10), (10, 12), (64, 1)]
)
def test_probes_are_as_many_as_asked(classes: int, count: int) -> None:
    pairs = spread(classes, count)
    assert len(set(pairs)) == count
    of_classes = np.bincount([c for c, _ in pairs], minlength=classes)
    assert of_classes.max() - of_classes.min() <= 1
    assert max(i for _, i in pairs) == (count - 1) // classes
    assert pairs[0] == (0, 0)
    assert pairs == sorted(pairs)


@pytest.mark.parametrize(
    ("images", "dials", "said"),
    [
        (3, {}, "best 3 of 24"),
        (10, {}, "best 5 of 40"),
        (50, {}, "best 8 of 58"),
        (50, {"modes": 2}, "best 7 of 50"),
        (50, {"share": 1}, "best 1 of 8"),
        (50, {"candidates": 1}, "derived"),
    ],
)
def test_seeds_are_said_as_they_are_drawn(images: int, dials: dict[str, int], said: str) -> None:
    chosen = Dials(**{"candidates": 8, "share": 8, **dials})  # type: ignore[arg-type]
    assert chosen.seeds(images) == f"seeds {said}"


# -- budget -----------------------------------------------------------------------------------


def toy_size(dials: Dials) -> int:
    """A pack of ten classes and ten images, by hand."""
    bits = {"i4": 4, "i8": 8, "f16": 16}[dials.codec]
    labels = {"none": 0, "top3": 400, "top5": 700, "top10": 1300, "dense": 2000}[dials.labels]
    prompts = 10 * dials.modes * dials.vectors * 192 * bits // 8
    return 4000 + prompts + (100 if dials.candidates > 1 else 0) + 250 * dials.probes + labels


def test_budget_is_spent_but_not_exceeded() -> None:
    sizes = []
    for total in range(6_000, 60_000, 2_000):
        dials, size = budget.spend(total, EncodeOptions(), 16, toy_size)
        assert size == toy_size(dials) <= total - budget.MARGIN
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4 * sizes[0]


def test_budget_keeps_what_was_set_by_hand() -> None:
    dials, _ = budget.spend(50_000, EncodeOptions(modes=3, labels="none"), 16, toy_size)
    assert (dials.modes, dials.labels) == (3, "none")
    assert dials.vectors > 1


def test_budget_respects_the_backbone() -> None:
    dials, _ = budget.spend(10**6, EncodeOptions(), 2, toy_size)
    assert dials.vectors == 2


def test_budget_that_is_too_small() -> None:
    with pytest.raises(UsageError, match="300 bytes are too few: the smallest pack"):
        budget.spend(300, EncodeOptions(), 16, toy_size)


def test_errors_have_codes_of_their_own() -> None:
    codes = {error.code for error in (JournalError, NoSpaceError)}
    assert len(codes) == 2
    assert D3MError.code not in codes


# -- what nobody chose ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "candidates", "guidance"),
    [
        ({"images_per_class": 50}, PICKY, None),
        ({"images_per_class": 10}, 1, 2.5),
        ({"images_per_class": 10, "candidates": 4}, 4, None),
        ({"images_per_class": 50, "candidates": 1}, 1, 2.5),
        ({"images_per_class": 50, "guidance": 3.0}, PICKY, 3.0),
        ({"images_per_class": 10, "budget": 20_000}, PICKY, None),
        ({"images_per_class": 10, "budget": 20_000, "guidance": 3.0}, PICKY, 3.0),
        ({"images_per_class": 10, "budget": 20_000, "candidates": 1}, 1, 2.5),
    ],
)
def test_where_a_teacher_picks_guidance_is_measured(
    tmp_path: Path, asked: dict[str, Any], candidates: int, guidance: float | None
) -> None:
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), name).save(tmp_path / name / f"{i}.png")
    options = EncodeOptions(backbone="mini", **asked)
    plan = D3M().plan(open_source(tmp_path), options, "cpu")
    assert plan.dials.candidates == candidates
    assert plan.guidance == guidance


@pytest.mark.parametrize(
    ("more", "bought"),
    [
        (0, {"share": SHARE}),  # of no candidates: costs nothing, means nothing
        (500, {"candidates": 4}),
        (749, {"candidates": 4}),
        (750, {"candidates": PICKY}),
        (1500, {"candidates": PICKY, "share": SHARE}),
    ],
)
def test_a_budget_buys_bits_of_picks_that_fit(more: int, bought: dict[str, int]) -> None:
    def size_of(dials: Dials) -> int:
        bare = replace(dials, candidates=1, share=1)
        picks = {
            (1, 1): 0,
            (1, SHARE): 0,
            (4, 1): 500,
            (4, SHARE): 1250,
            (PICKY, 1): 750,
            (PICKY, SHARE): 1500,
        }
        return 4000 + picks[dials.candidates, dials.share] + (bare != budget.BARE) * 9999

    dials, size = budget.spend(4000 + budget.MARGIN + more, EncodeOptions(), 16, size_of)
    assert dials == replace(budget.BARE, **bought)
    assert size <= 4000 + more
