"""What a card says of an `evaluation.json`: a few of its fields, each of which is checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3pack.errors import UsageError

MAX_BYTES = 1 << 26  # of a file; students of many seeds have long histories
_MAX_TEXT = 1000
_MAX_COUNT = 2**53


@dataclass(frozen=True, slots=True)
class Trained:
    """What students reached that were trained on one set of images."""

    title: str
    nbytes: float | None
    mean: float  # share of the test images
    std: float
    runs: int


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of `d3pack eval` that go onto a card."""

    root: str  # of the pack that was evaluated
    student: str
    protocol: str
    updates: int
    seeds: int
    test_images: int
    entries: tuple[Trained, ...]


def read_record(file: Path) -> Record:
    """Read an `evaluation.json`; raise `UsageError` where a field is missing or of a wrong type."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return _parse(json.loads(data))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UsageError(
            f"{file} is not a record of `d3pack eval`", hint="give its evaluation.json"
        ) from None


def _parse(value: Any) -> Record:
    facts = value["facts"]
    return Record(
        root=_text(value["pack"]["root"]),
        student=_text(facts["student"]),
        protocol=_text(value["protocol"]["name"]),
        updates=_count(facts["updates"]),
        seeds=_count(facts["seeds"]),
        test_images=_count(facts["test_images"]),
        entries=tuple(map(_trained, _list(value["entries"]))),
    )


def _trained(value: Any) -> Trained:
    nbytes, last = value["bytes"], value["last"]
    return Trained(
        title=_text(value["title"]),
        nbytes=None if nbytes is None else _number(nbytes, _MAX_COUNT),
        mean=_number(last["mean"], 1),
        std=_number(last["std"], 1),
        runs=len(_list(value["runs"])),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise TypeError("not a text")
    value.encode()  # half of a surrogate pair cannot be written
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise TypeError("not a count")
    return value


def _number(value: Any, most: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= most:
        raise TypeError("not a number")
    return float(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value
