"""Settings as frozen dataclasses: checks, errors, JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest

from d3pack.errors import UsageError
from d3pack.system.settings import (
    REQUIRED,
    SettingError,
    all_plain,
    argument,
    check,
    from_plain,
    json_schema,
    nested,
    option,
    options_of,
    plain,
    same_option,
)


def parse_side(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


@dataclass(frozen=True, slots=True)
class Loop:
    steps: int = option(40, "Steps at most.", ge=0)
    rate: float = option(3.0, "Length of a step.", gt=0, le=10)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Some:
    images: int = option(10, "Images per class.", flag="--ipc", ge=1, le=2**20)
    codec: Literal["f16", "i8"] | None = option(None, "How vectors are stored.")
    factor: int | None = option(None, "Side of a collage.", choices=(1, 2, 4))
    size: tuple[int, int] | None = option(
        None, "Pixels.", ge=1, parse=parse_side, expected="an integer or HEIGHTxWIDTH"
    )
    share: tuple[float, float] | None = option(None, "Least and most.", gt=0, le=1)
    names: tuple[str, ...] = option((), "Names.")
    teacher: Path | None = option(None, "A directory.", private=True)
    embed: bool = option(False, "Carry the backbone.")
    loop: Loop = nested(Loop)

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 0}, "invalid images 0: expected an integer from 1 to 1048576"),
        ({"images": True}, "invalid images True: expected an integer from 1 to 1048576"),
        ({"images": "5"}, "invalid images '5': expected an integer from 1 to 1048576"),
        ({"images": None}, "invalid images None: expected an integer from 1 to 1048576"),
        ({"images": 5.0}, "invalid images 5.0: expected an integer from 1 to 1048576"),
        ({"codec": "zip"}, "invalid codec 'zip': expected f16 or i8"),
        ({"factor": 3}, "invalid factor 3: expected 1, 2 or 4"),
        ({"size": (0, 4)}, "invalid size (0, 4): expected an integer or HEIGHTxWIDTH"),
        ({"size": (4,)}, "invalid size (4,): expected an integer or HEIGHTxWIDTH"),
        (
            {"share": (0, 1)},
            "invalid share (0, 1): expected 2 values that are each a number above 0, at most 1",
        ),
        ({"loop": None}, "invalid loop None: expected a Loop"),
        ({"names": "abc"}, "invalid names 'abc': expected values that are each text"),
        ({"embed": 1}, "invalid embed 1: expected true or false"),
    ],
)
def test_wrong_values_are_refused_by_their_python_names(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError) as caught:
        Some(**values)
    assert caught.value.args[0] == message
    assert (caught.value.code, caught.value.exit_code) == ("E_USAGE", 2)


@pytest.mark.parametrize("rate", [0, -1, 11, math.nan, math.inf])
def test_numbers_out_of_bounds_and_no_numbers_are_refused(rate: float) -> None:
    with pytest.raises(SettingError, match="expected a number above 0, at most 10"):
        Loop(rate=rate)


def test_check_turns_what_json_and_callers_use_into_what_the_field_holds() -> None:
    some = Some(
        images=np.int64(3),  # type: ignore[arg-type]
        size=[4, 6],  # type: ignore[arg-type]
        share=(np.float32(0.5), 1),  # type: ignore[arg-type]
        names=["a", "b"],  # type: ignore[arg-type]
        teacher="/t",  # type: ignore[arg-type]
    )
    assert type(some.images) is int
    assert (some.size, some.share, some.names) == ((4, 6), (0.5, 1.0), ("a", "b"))
    assert [type(value) for value in some.share or ()] == [float, float]
    assert some.teacher == Path("/t")
    with pytest.raises(FrozenInstanceError):
        some.images = 4  # type: ignore[misc]
    with pytest.raises(SettingError):
        replace(some, images=-1)


def test_plain_keeps_what_differs_and_all_plain_keeps_everything() -> None:
    some = Some(images=3, teacher=Path("/t"), loop=Loop(steps=1), size=(4, 4))
    assert plain(some) == {
        "images": 3, "teacher": "/t", "loop": {"steps": 1}, "size": [4, 4]
    }  # fmt: skip
    assert plain(Some()) == {}
    assert "teacher" not in plain(some, private=False)
    full = all_plain(some)
    assert list(full) == [entry.name for entry in options_of(Some)]
    assert full["loop"] == {"steps": 1, "rate": 3.0}
    for value in (plain(some), full):
        assert from_plain(Some, json.loads(json.dumps(value))) == some


def test_from_plain_refuses_unknown_missing_and_wrong_settings() -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'step': expected rate or steps.*steps"):
        from_plain(Loop, {"step": 3})
    with pytest.raises(UsageError, match="unknown setting 'x'"):
        from_plain(Some, {"loop": {"x": 1}})
    with pytest.raises(SettingError, match="invalid steps -1"):
        from_plain(Some, {"loop": {"steps": -1}})

    with pytest.raises(UsageError, match="missing setting 'source': expected text"):
        from_plain(Verb, {})


@dataclass(frozen=True, slots=True)
class Verb:
    source: str = argument("Real images.")
    output: Path = option(REQUIRED, "The pack to write.", short="-o")


def test_json_schema_accepts_what_plain_writes_and_little_else() -> None:
    schema = json_schema(Some)
    validator = jsonschema.Draft202012Validator(schema)
    for some in (Some(), Some(images=3, size=(4, 4), share=(0.5, 1), names=("a",), codec="i8")):
        validator.validate(all_plain(some))
    for wrong in (
        {"images": 0},
        {"images": 1.5},
        {"other": 1},
        {"size": [4]},
        {"codec": "zip"},
        {"loop": {"rate": 0}},
    ):
        assert not validator.is_valid(wrong), wrong
    assert schema["properties"]["images"]["default"] == 10
    assert json_schema(Verb)["required"] == ["output", "source"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("images", "12", 12),
        ("codec", "i8", "i8"),
        ("factor", "4", 4),
        ("size", "12x8", (12, 8)),
        ("size", "12", (12, 12)),
        ("share", ["0.5", "1"], (0.5, 1.0)),
        ("names", ["a", "b"], ("a", "b")),
        ("teacher", "~/t", Path.home() / "t"),
        ("embed", "yes", True),
    ],
)
def test_text_is_read_as_the_field_holds_it(name: str, text: Any, value: Any) -> None:
    (entry,) = [entry for entry in options_of(Some) if entry.name == name]
    assert entry.read(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("images", "many", "invalid --x 'many': expected an integer from 1 to 1048576"),
        ("images", "0", "invalid --x '0': expected an integer from 1 to 1048576"),
        ("size", "12y", "invalid --x '12y': expected an integer or HEIGHTxWIDTH"),
        ("share", ["1", "two"], "invalid --x '1 two': expected 2 values"),
        ("factor", "3", "invalid --x '3': expected 1, 2 or 4"),
        ("embed", "maybe", "invalid --x 'maybe': expected true or false"),
    ],
)
def test_text_that_is_no_value_is_refused_under_the_name_it_was_typed_for(
    name: str, text: Any, message: str
) -> None:
    (entry,) = [entry for entry in options_of(Some) if entry.name == name]
    with pytest.raises(SettingError) as caught:
        entry.read(text, "--x")
    assert caught.value.args[0].startswith(message)


def test_types_that_settings_cannot_have_are_an_error_of_the_class() -> None:
    @dataclass(frozen=True)
    class Wrong:
        x: dict[str, int] = option(None, "A table.")

    with pytest.raises(TypeError, match="settings cannot be of type"):
        options_of(Wrong)


def test_a_setting_of_another_class_keeps_its_bounds_under_another_default() -> None:
    @dataclass(frozen=True, slots=True)
    class Other:
        many: int = option(10, "Images.", flag="--many", ge=1, group="images")

    @dataclass(frozen=True, slots=True)
    class Same:
        few: int = same_option(Other, "many", default=2, help="Fewer.")

        def __post_init__(self) -> None:
            check(self)

    (declared,) = options_of(Same)
    assert (declared.name, declared.flag, declared.default) == ("few", "--many", 2)
    assert (declared.help, declared.group) == ("Fewer.", "")
    assert Same().few == 2
    with pytest.raises(SettingError, match="invalid few 0: expected an integer of at least 1"):
        Same(0)
