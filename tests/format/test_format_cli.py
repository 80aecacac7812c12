"""`d3pack info`, `verify`, `diff` as processes: exit codes, streams, widths, light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from format_packs import VALID, VECTORS, full

import d3pack
from d3pack.cli import main

EVERYTHING = VECTORS / "valid" / "everything.d3m"
CODES = VECTORS / "valid" / "codes.d3m"


def process(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "d3pack", *map(str, args)], capture_output=True, text=True
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process: what it prints and its exit code."""

    def run(*args: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["d3pack", *map(str, args)])
        code: Any = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def test_info_names_everything_and_fits_80_columns(command: Any) -> None:
    got = command("info", EVERYTHING)
    assert (got.returncode, got.stderr) == (0, "")
    assert max(map(len, got.stdout.splitlines())) <= 80
    pack = d3pack.read(EVERYTHING)
    words = "stable-diffusion mini ddim pq topk curated probes adapter container everything"
    lock = pack.recipe.backbone.lock
    for text in (pack.root, lock, *words.split(), "1 MB, licence", f"{pack.ledger().total:,}"):
        assert text in got.stdout, text


@pytest.mark.slow
@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_info_of_every_pack_fits(path: Path, command: Any) -> None:
    got = command("info", path)
    assert got.returncode == 0
    assert max(map(len, got.stdout.splitlines())) <= 80
    assert "\x1b" not in got.stdout


def test_info_as_json_and_quiet(command: Any) -> None:
    pack = d3pack.read(EVERYTHING)
    value = json.loads(command("info", EVERYTHING, "--format", "json").stdout)
    assert value["root"] == pack.root
    assert value["classes"] == list(pack.classes)
    assert value["recipe"] == json.loads(json.dumps(pack.recipe.to_json()))
    assert value["ledger"]["total"] == EVERYTHING.stat().st_size
    assert sum(value["ledger"]["sections"].values()) == value["ledger"]["total"]
    assert value["sections"]["prompts"]["codec"] == "pq"
    params = json.loads(command("info", CODES, "--format", "json").stdout)["sections"]["codes"]
    assert params["params"]["atoms"] == [1] * 5, "what the file leaves out is told"
    assert params["params"]["eta"] == 1.0
    assert command("info", EVERYTHING, "--format", "quiet").stdout == pack.root + "\n"


def test_verify_exit_codes(command: Any) -> None:
    bad = VECTORS / "invalid" / "trailing-byte.d3m"
    missing = VECTORS / "no.d3m"
    assert command("verify", *VALID).returncode == 0
    assert command("verify", EVERYTHING, bad).returncode == 3
    assert command("verify", missing, EVERYTHING).returncode == 5
    assert command("verify", missing, bad).returncode == 3
    got = command("verify", EVERYTHING, bad, missing, "--format", "json")
    codes = [result.get("code") for result in json.loads(got.stdout)]
    assert codes == [None, "E_TRAILING", "E_NOT_FOUND"]
    assert got.returncode == 3


def test_info_of_an_invalid_pack_is_one_line(command: Any) -> None:
    for path, code in ((VECTORS / "index.json", 3), (VECTORS / "no.d3m", 5), (VECTORS, 2)):
        got = command("info", path)
        assert got.returncode == code
        assert got.stdout == ""
        assert len(got.stderr.splitlines()) == 1
        assert "Traceback" not in got.stderr


def test_diff_lists_what_differs(tmp_path: Path, command: Any) -> None:
    a, b = tmp_path / "a.d3m", tmp_path / "b.d3m"
    pack = full()
    d3pack.write(pack, a)
    d3pack.write(pack.select([0, 1, 2]).first(3), b)
    same = command("diff", a, a)
    assert (same.returncode, pack.root in same.stdout) == (0, True)
    got = command("diff", a, b, "--format", "json")
    assert got.returncode == 1
    value = json.loads(got.stdout)
    what = {change["what"] for change in value["changes"]}
    assert {"classes", "images_per_class", "section prompts", "section labels"} <= what
    assert value["roots"] == [pack.root, d3pack.read(b).root]
    assert "seed" not in what
    assert "images_per_class: 6 -> 3" in command("diff", a, b).stdout


def test_hostile_names_are_escaped_on_the_terminal(tmp_path: Path, command: Any) -> None:
    path = tmp_path / "x\x1b[31m.d3m"
    path.write_bytes(EVERYTHING.read_bytes())
    for verb in ("info", "verify"):
        got = command(verb, path)
        assert got.returncode == 0
        assert "\x1b" not in got.stdout
    assert "\\x1b" in got.stdout


CHECK = """
import sys
from d3pack.cli import main
sys.argv = ["d3pack", *{args!r}]
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
loaded = set(sys.modules) & {{"torch", "diffusers", "transformers", "PIL", "huggingface_hub"}}
print("loaded", sorted(loaded), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [["info"], ["verify"], ["diff", str(EVERYTHING)]])
def test_torch_is_not_imported(args: list[str]) -> None:
    program = CHECK.format(args=[*args, str(EVERYTHING)])
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert got.stderr.strip() == "loaded []"


def cpu_seconds(*args: object) -> float:
    """Processor time of a command: what it takes on an idle machine, whatever else runs here."""
    before = os.times()
    assert process(*args).returncode == 0
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def test_info_takes_under_half_a_second() -> None:
    """The figure (200 ms) is benchmarks/format.py's; under this one no torch can hide."""
    best: Any = min(cpu_seconds("info", EVERYTHING) for _ in range(3))
    assert best < 0.5
