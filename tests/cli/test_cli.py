"""The command as a whole: its reference, its help, its manners."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli import invoke
from cli_schema import check_output
from places import ROOT, load

from d3pack.cli._command import all_verbs, flags_of
from d3pack.format import read, write

PACK = ROOT / "examples" / "cifar10.d3m"
MAKE = load(ROOT / "spec" / "make_cli.py")


def verbs() -> list[tuple[str, type]]:
    return sorted(all_verbs().items())


def d3pack(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "d3pack", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_reference_is_what_the_command_says() -> None:
    written = (ROOT / "spec" / "cli.md").read_text(encoding="utf-8")
    assert written == MAKE.reference(), "run: python spec/make_cli.py"


@pytest.mark.parametrize(("name", "verb"), verbs(), ids=[name for name, _ in verbs()])
def test_every_verb_explains_itself(name: str, verb: type) -> None:
    assert f"Example: d3pack {name}" in (verb.__doc__ or "")
    flags = list(flags_of(verb))
    for flag in flags:
        assert flag.option.help, f"{name}: {flag.label} has no help"
    assert any(flag.label == "--format" for flag in flags)
    page = invoke(*name.split(), "--help")
    assert page.exit_code == 0
    for flag in flags:
        assert flag.label in page.stdout
    assert invoke(*name.split(), "-h") == page


@pytest.mark.heavy
@pytest.mark.posix
def test_help_lists_every_verb_and_comes_at_once() -> None:
    import resource

    spent: list[float] = []
    while len(spent) < 3 or (min(spent) >= 0.25 and len(spent) < 12):  # neighbours take the caches
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = d3pack("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    for name, _ in verbs():
        assert name.split()[0] in done.stdout
    # Processor time, which is the time on a quiet core; a busy one does not count. About 0.11 s.
    assert min(spent) < 0.25


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["evn"], 2, "did you mean 'env'"),
        (["info", "x.d3m", "--fromat", "json"], 2, "--format"),
        (["info", "missing.d3m"], 5, "E_NOT_FOUND"),
        (["info", "x" * 300], 5, "E_NOT_FOUND"),
        (["decode", str(PACK), "-o", "/dev/null"], 2, "/dev/null is not a folder"),
        (["decode", str(PACK), "-o", "/dev/null/x"], 2, "/dev/null/x is not a folder"),
        (["decode", str(PACK), "-o", "x", "--tiny-vae", "nothere"], 5, "no directory nothere"),
        (["verify", "missing.d3m"], 5, "missing.d3m"),
        (["preview", "x.d3m", "-o", "x.gif"], 2, "E_USAGE"),
        (["eval", "x.d3m", "--real", "y", "--report", "no/x.html"], 5, "no is not a directory"),
        (["encode", "missing-folder", "-o", "x.d3m"], 5, "E_NOT_FOUND"),
    ],
)
def test_bad_calls_get_one_line_and_a_code(args: list[str], code: int, words: str) -> None:
    done = d3pack(*args)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.heavy
def test_not_a_pack_is_exit_code_3(tmp_path: Path) -> None:
    bad = tmp_path / "bad.d3m"
    bad.write_bytes(b"\x00" * 64)
    for verb in ("info", "verify"):
        done = d3pack(verb, str(bad))
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.heavy
@pytest.mark.e2e
@pytest.mark.parametrize("coding", ["ascii", "cp1252"])
def test_letters_that_the_output_lacks_are_escaped(coding: str, tmp_path: Path) -> None:
    pack = read(PACK)
    write(replace(pack, classes=("日本", *pack.classes[1:])), tmp_path / "x.d3m")
    done = d3pack("info", str(tmp_path / "x.d3m"), PYTHONIOENCODING=coding, PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u65e5\u672c" in done.stdout


@pytest.mark.posix
@pytest.mark.e2e
def test_user_without_a_home_is_told_what_to_set() -> None:
    done = d3pack("cache", "ls", D3PACK_HOME="~nobody-of-this-name/x")
    assert done.returncode == 2
    assert done.stderr.startswith("d3pack: [E_USAGE] no home directory is known for")
    assert "D3PACK_HOME" in done.stderr
    assert done.stderr.count("\n") == 1


def test_env_names_versions_and_no_place() -> None:
    done = d3pack("env", "--format", "json", HF_HOME="/a/private/place")
    facts = json.loads(done.stdout)
    assert facts["settings"]["HF_HOME"] == "set"
    assert facts["packages"]["torch"][0].isdigit()
    assert "/a/private/place" not in done.stdout
    assert str(Path.home()) not in done.stdout


@pytest.mark.heavy
def test_env_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/a/private/place")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    out = invoke("env").stdout
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert (rows["HF_HOME"], rows["HF_ENDPOINT"]) == ("set", "unset")
    assert rows["torch"][0].isdigit()
    assert "/a/private/place" not in out


@pytest.mark.slow
def test_env_measures_what_each_switch_brings() -> None:
    done = invoke("env", "--speed", "--format", "json")
    assert done.exit_code == 0, done.stderr
    check_output("env", done.stdout)
    rates = json.loads(done.stdout)["images_per_second"]
    assert rates.keys() == {"exact", "bf16", "channels_last", "fused_attention", "compile"}
    assert min(rates.values()) > 0, "each can be computed where there is a compiler"


@pytest.mark.heavy
def test_no_colour_in_a_pipe() -> None:
    assert "\x1b[" not in d3pack("--help").stdout
    assert "\x1b[" not in d3pack("encode", "--help", NO_COLOR="1").stdout


@pytest.mark.heavy
def test_exit_codes_of_the_reference_are_those_of_the_errors() -> None:
    """Every code that an error can carry is in the table, and the table names no other."""
    from d3pack import errors
    from d3pack.cli import INTERRUPTED
    from d3pack.system import WaitingError

    written = (ROOT / "spec" / "cli.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", written, re.MULTILINE)}
    carried = {
        error.exit_code
        for error in (*vars(errors).values(), WaitingError)
        if isinstance(error, type) and issubclass(error, errors.D3MError)
    }
    assert listed == {0, INTERRUPTED, *carried}
    told = d3pack("--help").stdout.split("Exit codes:")[1]
    assert {int(code) for code in re.findall(r"\b\d+\b", told)} == listed
