"""Settings of encode: their checks, what packs record of them, and what a budget is spent on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_world import settings_of
from PIL import Image

from d3pack.encode import (
    Allocation,
    ClassCondSettings,
    D3MSettings,
    EncodeContext,
    EncodeSettings,
    MinimaxSettings,
    allocation,
    available_methods,
    d3m_settings,
    open_method,
)
from d3pack.encode.allocation import PICKY, SHARE, SMALLEST
from d3pack.encode.finish import spread
from d3pack.encode.methods.d3m.method import D3M
from d3pack.encode.settings import parse_labels, recorded_settings
from d3pack.errors import D3MError, NoSpaceError, UsageError
from d3pack.sources import open_source
from d3pack.system import JournalError, SettingError, all_plain, from_plain, options_of

# -- settings ---------------------------------------------------------------------------------


def test_labels_are_parsed_to_kind_and_k() -> None:
    assert parse_labels("none") == ("none", 0)
    assert parse_labels("dense") == ("dense", 0)
    assert parse_labels("top5") == ("topk", 5)
    for text in ("top", "top0", "topx", "all"):
        with pytest.raises(UsageError, match=f"invalid labels '{text}'"):
            parse_labels(text)


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
def test_wrong_settings_are_refused_by_name(bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(SettingError, match=f"invalid {name} "):
        settings_of(**bad)


def test_error_names_both_limits() -> None:
    with pytest.raises(UsageError, match=r"invalid images_per_class 2000000: .* from 1 to 1048576"):
        EncodeSettings(images_per_class=2_000_000)


@pytest.mark.parametrize("own", [D3MSettings, ClassCondSettings, MinimaxSettings])
def test_settings_of_a_method_share_no_name_or_flag_with_the_others(own: type) -> None:
    entries = [*options_of(EncodeSettings), *options_of(own)]
    for values in (
        [entry.name for entry in entries],
        [entry.flag or f"--{entry.name.replace('_', '-')}" for entry in entries],
    ):
        assert len(values) == len(set(values))
    assert all(entry.help.endswith(".") for entry in entries)


def test_settings_come_back_from_json() -> None:
    settings = EncodeSettings(size=(16, 8), labels="top3", budget=9000)
    assert from_plain(EncodeSettings, all_plain(settings)) == settings


# -- provenance -------------------------------------------------------------------------------


def test_only_what_was_chosen_is_recorded() -> None:
    assert recorded_settings(EncodeSettings(), "d3m") == {}
    chosen = settings_of(modes=2, lr=0.05)
    assert recorded_settings(chosen, "d3m") == {"modes": 2, "lr": 0.05}


def test_places_on_this_machine_are_not_recorded() -> None:
    private = settings_of(backbone="/b", teacher="/t", teacher_map="/m", device="cpu", seed=3)
    assert recorded_settings(private, "d3m") == {"seed": 3}
    autoencoder = settings_of(method="classcond", vae="/v")
    assert recorded_settings(autoencoder, "classcond") == {"extra": {}}


def test_spelling_of_recorded_settings_stays() -> None:
    """It is part of a pack's bytes."""
    classcond = settings_of(
        method="classcond",
        seed=3,
        model="tiny",
        train_steps=5,
        train_seconds=60,
        decode_seconds=2.5,
        embed=True,
        licence="mit",
    )
    assert recorded_settings(classcond, "classcond") == {
        "seed": 3,
        "extra": {
            "preset": "tiny",
            "train_steps": "5",
            "train_seconds": 60.0,
            "decode_seconds": 2.5,
            "embed": True,
            "licence": "mit",
        },
    }
    minimax = settings_of(method="minimax", epochs=2, ema=0.9, adapter="i8")
    assert recorded_settings(minimax, "minimax") == {
        "extra": {"epochs": "2", "ema": "0.9", "adapter": "i8"}
    }


def test_recorded_settings_of_d3m_are_read_back() -> None:
    settings = settings_of(images_per_class=3, size=(16, 8), crop_scale=(0.2, 0.8), vectors=2)
    assert d3m_settings(recorded_settings(settings, "d3m")) == settings
    with pytest.raises(UsageError, match="unknown setting 'colour'"):
        d3m_settings({"colour": "red"})


# -- methods ----------------------------------------------------------------------------------


def test_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'magic': expected .*d3m"):
        open_method("magic")
    assert "d3m" in available_methods()


# -- probes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "count"), [(2, 6), (3, 16), (10, 8), (10, 10), (10, 12), (64, 1)]
)
def test_probes_are_spread_over_the_classes(classes: int, count: int) -> None:
    pairs = spread(classes, count)
    assert len(set(pairs)) == count
    of_classes = np.bincount([c for c, _ in pairs], minlength=classes)
    assert of_classes.max() - of_classes.min() <= 1
    assert max(i for _, i in pairs) == (count - 1) // classes
    assert pairs[0] == (0, 0)
    assert pairs == sorted(pairs)


@pytest.mark.parametrize(
    ("images", "parts", "text"),
    [
        (3, {}, "best 3 of 24"),
        (10, {}, "best 5 of 40"),
        (50, {}, "best 8 of 58"),
        (50, {"modes": 2}, "best 7 of 50"),
        (50, {"share": 1}, "best 1 of 8"),
        (50, {"candidates": 1}, "derived"),
    ],
)
def test_seeds_in_words(images: int, parts: dict[str, int], text: str) -> None:
    allocated = Allocation(**{"candidates": 8, "share": 8, **parts})  # type: ignore[arg-type]
    assert allocated.seeds(images) == f"seeds {text}"


# -- budget -----------------------------------------------------------------------------------


def toy_size(part: Allocation) -> int:
    """A pack of ten classes and ten images, by hand."""
    bits = {"i4": 4, "i8": 8, "f16": 16}[part.codec]
    labels = {"none": 0, "top3": 400, "top5": 700, "top10": 1300, "dense": 2000}[part.labels]
    prompts = 10 * part.modes * part.vectors * 192 * bits // 8
    return 4000 + prompts + (100 if part.candidates > 1 else 0) + 250 * part.probes + labels


def test_budget_is_spent_but_not_exceeded() -> None:
    sizes = []
    for total in range(6_000, 60_000, 2_000):
        bought, size = allocation.spend(total, {}, 16, toy_size)
        assert size == toy_size(bought) <= total - allocation.MARGIN
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4 * sizes[0]


def test_budget_keeps_what_the_user_has_set() -> None:
    fixed = {"modes": 3, "labels": "none"}
    bought, _ = allocation.spend(50_000, fixed, 16, toy_size)
    assert (bought.modes, bought.labels) == (3, "none")
    assert bought.vectors > 1


def test_budget_buys_no_more_vectors_than_the_backbone_takes() -> None:
    bought, _ = allocation.spend(10**6, {}, 2, toy_size)
    assert bought.vectors == 2


def test_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="300 bytes are too few: the smallest pack"):
        allocation.spend(300, {}, 16, toy_size)


def test_errors_have_codes_of_their_own() -> None:
    codes = {error.code for error in (JournalError, NoSpaceError)}
    assert len(codes) == 2
    assert D3MError.code not in codes


# -- defaults ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "candidates", "guidance"),
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
def test_guidance_is_measured_where_a_teacher_picks(
    tmp_path: Path, values: dict[str, Any], candidates: int, guidance: float | None
) -> None:
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), name).save(tmp_path / name / f"{i}.png")
    context = EncodeContext("cpu", tmp_path)
    settings = EncodeSettings(backbone="mini", **values)
    job = D3M().prepare(open_source(tmp_path), settings, D3MSettings(), context)
    assert job.plan.allocation.candidates == candidates
    assert job.details.guidance == guidance


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
def test_budget_buys_the_bits_of_picks_that_fit(more: int, bought: dict[str, int]) -> None:
    def size_of(part: Allocation) -> int:
        bare = replace(part, candidates=1, share=1)
        picks = {
            (1, 1): 0,
            (1, SHARE): 0,
            (4, 1): 500,
            (4, SHARE): 1250,
            (PICKY, 1): 750,
            (PICKY, SHARE): 1500,
        }
        return 4000 + picks[part.candidates, part.share] + (bare != SMALLEST) * 9999

    part, size = allocation.spend(4000 + allocation.MARGIN + more, {}, 16, size_of)
    assert part == replace(SMALLEST, **bought)  # type: ignore[arg-type]
    assert size <= 4000 + more
