"""Settings of encode and of its methods: wrong values are refused before the work begins."""

from __future__ import annotations

import pytest

from d3pack.encode import ClassCondSettings, EncodeSettings, MinimaxSettings
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
