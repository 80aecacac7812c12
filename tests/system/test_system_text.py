"""Numbers as a person says them."""

from __future__ import annotations

import pytest

from d3pack.errors import UsageError
from d3pack.system.text import (
    clock,
    count,
    duration,
    first_line,
    parse_duration,
    parse_size,
    printable,
    size,
)


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (69.6, "0:01:10"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock_shows_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6000", 6000),
        ("20KB", 20_000),
        ("20 kb", 20_000),
        ("20k", None),
        ("4 KiB", 4096),
        ("5 potatoes", None),
        ("1e400", None),
        ("nanKB", None),
        ("64KiB", 65_536),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 << 20),
        ("1GB", 10**9),
        ("1GiB", 1 << 30),
        (" 7B ", 7),
        ("12x", None),
        ("", None),
        ("0", None),
        ("-3KB", None),
        ("0.2B", None),
        ("nan", None),
        ("infKB", None),
        ("KB", None),
    ],
)
def test_parse_size(text: str, nbytes: int | None) -> None:
    if nbytes is not None:
        assert parse_size(text) == nbytes
        return
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    said = f"invalid size {text!r}: expected bytes such as 20KB, 64KiB or 1.5MB"
    assert str(caught.value) == f"[E_USAGE] {said}"


def test_parse_duration() -> None:
    assert [parse_duration(text) for text in ("600s", "90m", "1.5h")] == [600.0, 5400.0, 5400.0]
    for text in ("soon", "0m", "-1h", "90", "1e3s", ""):
        with pytest.raises(UsageError, match=r"expected a time such as 600s, 90m or 1\.") as caught:
            parse_duration(text)
        assert f"invalid duration {text!r}" in str(caught.value)


def test_printable_shows_control_characters() -> None:
    assert printable("goldfish é") == "goldfish é"
    assert printable("a\x1b[31m\n") == "a\\x1b[31m\\n"


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
