"""Settings of an evaluation: made from the registries, checked before anything is trained."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d3pack.errors import UsageError
from d3pack.evaluate import BASELINES, PROTOCOLS, EvalSettings
from d3pack.evaluate.sweep import parse_sweep
from d3pack.system import options_of

OPTIONS = {entry.name: entry for entry in options_of(EvalSettings)}


def test_choices_defaults_and_help_of_baselines_come_from_the_registry() -> None:
    entry = OPTIONS["baselines"]
    assert entry.choices == (*BASELINES, "none")
    assert entry.default == ("random", "jpeg", "webp", "sheet", "avif", "names")
    for name, baseline in BASELINES.items():
        assert f"{name}: {baseline.help}" in entry.help


def test_choices_of_protocols_come_from_the_registry() -> None:
    assert OPTIONS["protocol"].choices == tuple(PROTOCOLS)
    small = "rded-soft-small"
    names = ("quick", "standard", "dc", "eccv24", "minimax-hard", "dd-ranking", "rded-soft", small)
    assert tuple(PROTOCOLS) == names


def test_settings_are_read_without_torch_and_numpy() -> None:
    check = (
        "import sys; from d3pack.evaluate import EvalSettings; EvalSettings();"
        " sys.exit(bool({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_none_and_whole_change_the_baselines() -> None:
    assert EvalSettings(baselines=("none",)).baselines == ()
    assert EvalSettings(baselines=("none",), whole=True).baselines == ("whole",)
    assert EvalSettings(baselines=("whole", "jpeg"), whole=True).baselines == ("whole", "jpeg")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"baselines": ("png",)}, "invalid baselines.*png.*expected.*jpeg"),
        ({"baselines": ("none", "jpeg")}, "expected none alone"),
        ({"protocol": "best"}, "invalid protocol 'best': expected quick.*rded-soft-small"),
        ({"seeds": 0}, "invalid seeds 0: expected an integer of at least 1"),
        ({"size": 4}, "invalid size 4: expected an integer from 8 to 1024"),
        ({"baselines": ("chosen",)}, "baseline chosen needs a teacher"),
        ({"baselines": ("rded",)}, "baseline rded needs a teacher"),
        ({"protocol": "rded-soft"}, "protocol rded-soft needs a teacher"),
    ],
)
def test_invalid_settings_say_what_is_expected(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EvalSettings(**values)  # type: ignore[arg-type]


def test_unknown_protocol() -> None:
    with pytest.raises(UsageError, match=r"invalid protocol 'best': .*minimax-hard"):
        EvalSettings(protocol="best")


def test_sweep_is_read_axis_by_axis() -> None:
    assert parse_sweep(()) == {}
    texts = ("ipc=1,5", "codec=f16,i4", "labels=none,top2,dense", "vectors=3")
    assert parse_sweep(texts) == {
        "ipc": ["1", "5"],
        "codec": ["f16", "i4"],
        "labels": ["none", "top2", "dense"],
        "vectors": ["3"],
    }


@pytest.mark.parametrize(
    "text",
    ["colour=red", "ipc", "ipc=", "ipc=0", "ipc=1,,2", "ipc=-1", "labels=abc5", "labels=top",
     "labels=top0", "vectors=x", "codec="],
)  # fmt: skip
def test_invalid_sweep_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"invalid sweep '{text}': expected"):
        parse_sweep([text])
