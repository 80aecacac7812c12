"""Flags of all verbs: one meaning each, and errors that call them by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import invoke
from places import ROOT

from d3pack.cli._command import all_verbs, flags_of
from d3pack.cli.encode import _DECIDE, Encode, deciding_flags, left_over, shorter

PACK = ROOT / "examples" / "cifar10.d3m"

# one word, but what it takes depends on what is made: a pack, a folder, a page
SEVERAL_TYPES = {
    "--output": "a path, or an address where a verb can write to one",
    "--backbone": "a name, a Hub id or a directory; push needs the files, so a directory",
    "--size": "of images, or the one side at which students work",
    "PACK": "a file or an address; push publishes a file",
}


def test_a_flag_is_one_type_in_every_verb() -> None:
    types: dict[str, set[type]] = {}
    for verb in all_verbs().values():
        for flag in flags_of(verb):
            types.setdefault(flag.label, set()).add(flag.option.kind.base)
    several = {label for label, found in types.items() if len(found) > 1}
    assert several == SEVERAL_TYPES.keys()


def test_the_device_is_explained_once() -> None:
    flags = [flag for verb in all_verbs().values() for flag in flags_of(verb)]
    told = [flag.option.help for flag in flags if flag.label == "--device"]
    assert len(told) > 5
    assert len(set(told)) == 1


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("d3m", "sampler depends on --fitted-steps"),
        ("classcond", "sampler depends on --search-images"),
        ("minimax", "sampler depends on --search-images"),
    ],
)
def test_a_plan_names_flags_that_the_method_has(method: str, line: str) -> None:
    assert list(shorter({"sampler": 60.0, "read": 90.0}, deciding_flags(method))) == [line]
    assert not list(shorter({"sampler": 20.0}, deciding_flags(method))), "short enough"


@pytest.mark.parametrize(
    ("budget", "nbytes", "said"),
    [
        (None, 100, None),
        (10_000, 10_000, None),
        (10_000, 9_000, None),
        (10_000, 3_000, "7,000 bytes of the budget are left: nothing more was worth them"),
    ],
)
def test_what_a_pack_leaves_of_its_budget_is_said(
    budget: int | None, nbytes: int, said: str | None
) -> None:
    assert left_over(budget, nbytes) == said


def test_flags_that_shorten_an_encoding_exist() -> None:
    named = {flag for flags in _DECIDE.values() for flag in flags}
    methods = ("d3m", "classcond", "minimax", "modes", "codes")
    flags = {f.label for name in methods for f in flags_of(Encode, ("--method", name))}
    assert named <= flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--codes 30 --ipc 10", "invalid --codes 30: expected at most --ipc, 10"),
        ("--code-tried 256 --code-bits 4", "at most 16, the entries for --code-bits 4"),
        ("--codes 3 --no-codes", "--codes and --no-codes exclude each other"),
        ("--method classcond --embed-bits 4", "set --embed-backbone as well"),
        ("--size 12x", "invalid --size '12x': expected an integer or HEIGHTxWIDTH"),
        ("--size 100000", "invalid --size '100000x100000': expected sides of 1 to 8,192 pixels"),
        ("--size x12", "invalid --size 'x12': expected an integer or HEIGHTxWIDTH"),
        ("--size 1_2", "invalid --size '1_2': expected an integer or HEIGHTxWIDTH"),
        ("--ipc +3", "invalid --ipc '+3': expected an integer from 1 to 1048576"),
        ("--for-updates 1_0", "expected an integer, quick or standard"),
        ("--ipc 1_0", "invalid --ipc '1_0': expected an integer from 1 to 1048576"),
        ("--labels top\u0663", "expected none, dense, or top1, top2, ..."),
    ],
)
def test_encode_refuses_by_the_names_of_its_flags(words: str, message: str) -> None:
    done = invoke("encode", "nowhere", "-o", "x.d3m", *words.split())
    assert done.exit_code == 2
    assert message in done.stderr


def test_an_unknown_device_is_told_by_its_flag_before_the_source_is_opened(tmp_path: Path) -> None:
    done = invoke("encode", tmp_path / "nowhere", "-o", tmp_path / "x.d3m", "--device", "nope")
    assert done.exit_code == 2
    assert "invalid --device 'nope': expected cpu, cuda, cuda:1 or mps" in done.stderr


def test_an_unknown_switch_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    done = invoke("decode", PACK, "-o", tmp_path / "x", "--fast", "foo")
    assert done.exit_code == 2
    assert "'compile', 'tiny_vae'" in done.stderr


def test_names_in_faults_of_packs_and_of_files_stay_as_they_are(tmp_path: Path) -> None:
    bad = ROOT / "spec" / "vectors" / "invalid" / "field-missing.d3m"
    told = {
        verb: invoke(*words, "--format", "json").stderr
        for verb, words in {
            "info": ("info", bad),
            "preview": ("preview", bad, "-o", tmp_path / "x.png"),
        }.items()
    }
    assert "--ipc" not in told["preview"]
    assert told["preview"] == told["info"]
    done = invoke("preview", tmp_path / "images_per_class.d3m", "-o", tmp_path / "x.png")
    assert done.exit_code == 5
    assert "images_per_class.d3m" in done.stderr
