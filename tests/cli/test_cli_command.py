"""From a dataclass to a command: flags, checks under their names, nested settings, help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from cli import invoke

from d3pack.cli import _command
from d3pack.errors import UsageError
from d3pack.system import REQUIRED, SettingError, argument, check, nested, option

RUNS: list[Any] = []


@dataclass(frozen=True, slots=True)
class Crop:
    share: tuple[float, float] = option((0.5, 1.0), "Least and most.", gt=0, le=1)
    keep: bool = option(True, "Keep what is cut off.")

    def __post_init__(self) -> None:
        check(self)
        if self.share[0] > self.share[1]:
            raise SettingError("share", self.share, "the smaller one first")


@dataclass(frozen=True, slots=True)
class Large:
    epochs: int = option(8, "Times over the images.", ge=1)


@dataclass(frozen=True, slots=True)
class Small:
    layers: int = option(2, "Layers.", ge=1, group="sizes")


def settings_of(method: str) -> type | None:
    if method not in {"large", "small", "none"}:
        raise UsageError(f"no method {method!r}")
    return {"large": Large, "small": Small, "none": None}[method]


@dataclass(frozen=True, slots=True)
class Verb:
    """Do it.

    Example: d3pack verb x
    """

    places: tuple[str, ...] = argument("Where to look.")
    output: Path = option(REQUIRED, "Where to write.", short="-o")
    images: int = option(10, "Images per class.", flag="--ipc", ge=1, le=2**20)
    codec: Literal["f16", "i8"] | None = option(None, "How vectors are stored.")
    names: tuple[str, ...] = option((), "Names; repeatable.", flag="--name")
    hidden: int = option(3, "For Python only.", flag="")
    method: str = option("large", "How it is done.")
    note: str = option("~", "Any text.")
    crop: Crop = nested(Crop, group="Crops")
    own: Any = _command.chosen("method", settings_of)

    def run(self) -> int | None:
        if self.images == 14:
            raise UsageError("images=14 with keep", hint="set keep=True, codec='i8' or note=")
        RUNS.append(self)
        return 1 if self.images == 13 else None


@pytest.fixture(autouse=True)
def verb(monkeypatch: pytest.MonkeyPatch) -> None:
    RUNS.clear()
    monkeypatch.setattr(_command, "verb_names", lambda: ["verb"])
    monkeypatch.setattr(_command, "verbs_of", lambda name: {"verb": Verb})


def built(*words: str) -> Verb:
    result = invoke("verb", *words)
    assert (result.exit_code, result.output) == (0, "")
    (made,) = RUNS
    assert isinstance(made, Verb)
    return made


def test_defaults_are_those_of_the_class() -> None:
    assert built("x", "-o", "out") == Verb(("x",), Path("out"), own=Large())


def test_flags_in_any_order_give_the_fields() -> None:
    made = built(
        "--ipc", "3", "x", "--name=a", "-oout", "--codec", "i8", "y", "--name", "b",
        "--share", "0.1", "0.2", "--no-keep", "--method=small", "--layers", "5",
    )  # fmt: skip
    assert made == Verb(
        ("x", "y"), Path("out"), 3, "i8", ("a", "b"), method="small",
        crop=Crop((0.1, 0.2), False), own=Small(5),
    )  # fmt: skip


def test_home_is_expanded_in_paths() -> None:
    made = built("x", "--output=~/out", "--method=small", "--note=~/n")
    assert made.output == Path.home() / "out"
    assert made.note == str(Path.home() / "n")


def test_exit_code_is_what_run_returns() -> None:
    assert invoke("verb", "x", "-o", "y", "--ipc", "13").exit_code == 1


def test_errors_of_the_library_name_flags() -> None:
    result = invoke("verb", "x", "-o", "y", "--ipc", "14")
    text = "[E_USAGE] --ipc 14 with keep; set --keep, --codec 'i8' or --note"
    assert result.stderr == f"d3pack: {text}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x -o y --ipc 0", "invalid --ipc '0': expected an integer from 1 to 1048576"),
        ("x -o y --ipc many", "invalid --ipc 'many': expected an integer from 1 to 1048576"),
        ("x -o y --codec zip", "invalid --codec 'zip': expected f16 or i8"),
        ("x -o y --share 0.1 2", "invalid --share '0.1 2': expected 2 values that are each"),
        ("x -o y --share 0.2 0.1", "invalid --share (0.2, 0.1): expected the smaller one first"),
        ("x -o y --layers 3", "no option '--layers'"),
        ("x -o y --epochs 0", "invalid --epochs '0': expected an integer of at least 1"),
        ("x -o y --method large --method small --epochs 1", "no option '--epochs'"),
        ("x -o y --method magic", "no method 'magic'"),
        ("x -o y --hidden 3", "no option '--hidden'"),
        ("x -o y --hel", "no option '--hel'; did you mean '--help'?"),
        ("x -o y --ipc", "option '--ipc' requires an argument"),
        ("x -o y --keep", "no option '--keep'"),
        ("x", "missing --output: expected a path"),
        ("-o y", "missing PLACES: expected values that are each text"),
    ],
)
def test_wrong_calls_name_the_flag_and_end_with_2(words: str, message: str) -> None:
    result = invoke("verb", *words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"d3pack: [E_USAGE] {message}")
    assert len(result.stderr.splitlines()) == 1
    assert RUNS == []


def test_help_lists_settings_of_the_method_under_a_heading_of_their_own() -> None:
    page = invoke("verb", "--method", "small", "--help").stdout
    shared, _, own = page.partition("Settings of --method small: sizes:")
    assert "--layers INTEGER" in own
    assert "[default: 2, at least 1]" in own
    assert "--epochs" not in page
    assert "Crops:" in shared
    assert "--share NUMBER NUMBER" in shared
    assert "--no-keep" in shared
    assert "--hidden" not in page
    for text in ("Example: d3pack verb x", "PLACES", "-o, --output PATH", "[f16|i8]", "required"):
        assert text in shared, text
    assert "--epochs" in invoke("verb", "-h").stdout
    assert "Settings" not in invoke("verb", "-h", "--method", "none").stdout


def test_version_and_unknown_commands() -> None:
    import d3pack

    assert invoke("--version").stdout == f"{d3pack.__version__}\n"
    assert "no command 'vreb'; did you mean 'verb'?" in invoke("vreb").stderr
    assert "Commands:" in invoke("--help").stdout


def test_command_alone_shows_three_things_to_do_first() -> None:
    alone = invoke()
    assert (alone.exit_code, alone.stderr) == (0, "")
    assert re.findall(r"^  (\d)\. ", alone.stdout, re.MULTILINE) == ["1", "2", "3"]
    commands = re.findall(r"^ +d3pack (\w+)", alone.stdout, re.MULTILINE)
    assert commands == ["demo", "encode"]
    lines = [line for line in alone.stdout.splitlines() if "D3MDataset" in line]
    compile("\n".join(line.strip() for line in lines), "lines", "exec")
