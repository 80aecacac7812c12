"""Settings of encode and of its methods: wrong values are refused before the work begins."""

from __future__ import annotations

from typing import Any

import pytest

from d3pack.encode import ClassCondSettings, EncodeSettings, MinimaxSettings
from d3pack.encode.settings import check_used
from d3pack.errors import UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_steps", -1), ("train_seconds", float("nan")), ("train_seconds", float("inf")),
        ("decode_seconds", -5.0), ("search_images", -3),
    ],
)  # fmt: skip
def test_classcond_settings_refuse(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"invalid {name} .*: expected .* (of at least|from) 0"):
        ClassCondSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", float("nan")), ("lr", -1.0), ("lr", 0.0), ("drop", 7.0), ("drop", -0.1),
        ("train_steps", -1), ("epochs", 0), ("batch", 0), ("memory", 0), ("ema", 1.0),
        ("ema", float("nan")), ("diverse", float("inf")), ("representative", -1.0),
        ("search_images", -3), ("decode_seconds", -5.0),
    ],
)  # fmt: skip
def test_minimax_settings_refuse(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"invalid {name} "):
        MinimaxSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "unused", "beside"),
    [
        ("d3m", {"code_bits": 10}, {"codes": 2}),
        ("d3m", {"code_tried": 2}, {"budget": 9_000}),
        ("classcond", {"code_atoms": 2}, {"codes": 2}),
        ("minimax", {"code_steps": 4}, {"codes": 2}),
        ("d3m", {"for_updates": 800}, {"budget": 9_000}),
    ],
)
def test_settings_that_say_nothing_are_refused(
    method: str, unused: dict[str, int], beside: dict[str, int]
) -> None:
    (name,) = unused
    with pytest.raises(UsageError, match=f"invalid {name} .*: expected no value, since"):
        check_used(EncodeSettings(**unused), method)  # type: ignore[arg-type]
    check_used(EncodeSettings(**unused, **beside), method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("d3m", {"for_updates": 800, "budget": 9_000, "codes": 2}),
        ("d3m", {"code_bits": 10, "budget": 9_000, "no_codes": True}),
        ("minimax", {"for_updates": 800, "budget": 9_000}),
        ("classcond", {"code_bits": 10, "budget": 9_000}),
        ("codes", {"guidance": 2.0}),
        ("codes", {"sampler": "ddim"}),
        ("codes", {"sampler_steps": 4}),
        ("codes", {"codec": "i4"}),
        ("codes", {"for_updates": 800}),
        ("codes", {"label_temperature": 2.0}),
        ("d3m", {"select": "s3", "candidates": 1}),
        ("classcond", {"select": "draws", "codes": 3, "images_per_class": 3}),
    ],
)
def test_settings_of_what_is_not_made_are_refused(method: str, values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"invalid \w+ .*: expected no value, since"):
        check_used(EncodeSettings(**values), method)


def test_plugins_know_what_they_use() -> None:
    check_used(EncodeSettings(code_bits=4, for_updates=800, guidance=2.0), "mine")
    check_used(EncodeSettings(), "d3m")


def test_time_limit_of_a_search_needs_the_search() -> None:
    with pytest.raises(
        UsageError, match=r"decode_seconds limits the search .*search_images as well"
    ):
        MinimaxSettings(decode_seconds=5.0)
    assert MinimaxSettings(decode_seconds=5.0, search_images=12).decode_seconds == 5.0


@pytest.mark.parametrize(
    "values", [{"guidance": 10**400}, {"images_per_class": 10**5000}, {"seed": -(10**5000)}]
)
def test_numbers_beyond_all_types_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="invalid"):
        EncodeSettings(**values)  # type: ignore[arg-type]
