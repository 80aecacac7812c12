"""Numbers as a person says them."""

from __future__ import annotations

import pytest

from d3pack.system.text import count, duration, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (19.74, "19.7 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (5000, "5 kB"),
        (9864, "9.86 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (23_480_664, "23.5 MB"),
        (5.1e9, "5.1 GB"),
        (1.234e13, "12,340 GB"),
    ],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.2, "1 s"),
        (59.0, "59 s"),
        (59.5, "1 min 00 s"),
        (158, "2 min 38 s"),
        (3600, "1 h 00 min"),
        (47 * 3600 + 300, "47 h 05 min"),
        (1_080_000, "12.5 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_and_many() -> None:
    assert count(1, "probe") == "1 probe"
    assert count(0, "probe") == "0 probes"
    assert count(1200, "image") == "1,200 images"
