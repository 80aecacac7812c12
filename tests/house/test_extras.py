"""Packages of extras: the base install works without them, and their lack is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from encode_world import make_tree
from places import ROOT

from d3pack.cli._command import all_verbs
from d3pack.errors import HubError, NotFoundError, UsageError
from d3pack.system import EXTRAS, load, require

WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):  # as in a base install: none of them is found
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {sorted(EXTRAS)}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""
PACK = ROOT / "examples" / "cifar10.d3m"
# What is typed, in a folder with real images in photos/: the missing package and its extra, or how
# the command ends without one.
COMMANDS: dict[str, tuple[str, str] | int] = {
    "encode photos/train -o a.d3m --backbone mini": ("threadpoolctl", "encode"),
    "encode photos/train -o a.d3m --method classcond": ("accelerate", "encode"),
    "encode photos/train --dry-run --backbone mini": ("threadpoolctl", "encode"),
    "train photos -o backbone --preset tiny": ("accelerate", "encode"),
    "code photos/train -o c.d3m --bytes-per-image 3": 0,
    f"eval {PACK} --real photos --report a.html": ("matplotlib", "eval"),
    "demo": ("scikit-learn", "demo"),
    f"decode {PACK} -o out --to parquet": ("pyarrow", "encode"),
    f"decode {PACK} -o out --ipc 1 --classes 0": 0,
    f"decode {PACK} -o out --devices 2": ("ray", "ray"),
    "code photos/train -o c.d3m --bytes-per-image 3 --devices 2": ("ray", "ray"),
    f"export-embeddings {PACK} -o out": 0,
    "import-embeddings none --backbone mini --template {} -o a.d3m": NotFoundError.exit_code,
    f"info {PACK}": 0,
    f"verify {PACK}": 0,
    f"diff {PACK} {PACK}": 0,
    f"preview {PACK} -o sheet.png --ipc 1": 0,
    "view none.d3m": NotFoundError.exit_code,
    "merge none.parts -o out.d3m": NotFoundError.exit_code,
    f"push {PACK} org/name --licence mit --preview none": HubError.exit_code,  # no token
    "pull hf://datasets/org/name/a.d3m": HubError.exit_code,  # no network
    "info s3://bucket/a.d3m": ("s3fs", "s3"),
    "verify gs://bucket/a.d3m": UsageError.exit_code,
    "env": 0,
    "cache ls": 0,
    "cache rm --all": 0,
    "cache verify": 0,
}


def base_install(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that can import none of the optional packages."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + code],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_require_imports_a_module_that_is_installed() -> None:
    assert require("json") is __import__("json")


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_require_names_the_extra_of_a_missing_package(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package, extra = EXTRAS[module]
    with pytest.raises(UsageError, match=rf"the chart needs the package '{package}'; ") as raised:
        require(module, "the chart")
    assert raised.value.hint == f"pip install 'd3pack[{extra}]'"


def test_load_names_the_extra_of_a_package_that_a_module_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import pyarrow.parquet\n")
    (tmp_path / "other.py").write_text("import nobody.knows\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert load("json:dumps", "this") is json.dumps
    with pytest.raises(UsageError, match="the chart needs the package 'pyarrow'; "):
        load("needy:NAME", "the chart")
    with pytest.raises(ModuleNotFoundError, match="nobody"):
        load("other:NAME", "the chart")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
def test_extras_are_those_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in EXTRAS.values():
        listed = project["optional-dependencies"][extra]
        assert any(requirement.startswith(f"{package}>=") for requirement in listed), package
        assert not any(wish.startswith(f"{package}>=") for wish in project["dependencies"])
    weights = [
        extra
        for extra, listed in project["optional-dependencies"].items()
        if any(wish.startswith("d3pack-mini") for wish in listed)
    ]
    assert weights == ["mini"]  # they are asked for by this name


@pytest.mark.e2e
@pytest.mark.parametrize("typed", COMMANDS, ids=lambda typed: typed.replace(str(PACK), "PACK"))
def test_base_install_runs_a_verb_or_names_its_extra_in_one_line(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    make_tree(tmp_path / "photos" / "train", 2)
    make_tree(tmp_path / "photos" / "test", 2)
    before = sorted(tmp_path.rglob("*"))
    code = f"sys.argv[1:] = {typed.split()}; from d3pack.cli import main; main()"
    done = base_install(code, tmp_path)
    expected = COMMANDS[typed]
    if isinstance(expected, int):
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr
        return
    package, extra = expected
    assert done.returncode == UsageError.exit_code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        rf"d3pack: \[E_USAGE\] .* needs the package '{package}'; pip install 'd3pack\[{extra}\]'",
        line,
    )
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_commands_without_extras_cover_every_verb() -> None:
    for verb in all_verbs():
        assert any(f"{typed} ".startswith(f"{verb} ") for typed in COMMANDS), verb


@pytest.mark.e2e
def test_base_install_decodes_and_trains_on_a_pack(tmp_path: Path) -> None:
    code = f"""
from d3pack import D3MDataset, Decoder, read
pack = read({str(PACK)!r}).first(1)
assert Decoder(pack).images([0, 1]).shape == (2, 3, 64, 64)
dataset = D3MDataset(pack, cache="cpu")
assert dataset[9][1] == 9
"""
    done = base_install(code, tmp_path)
    assert done.returncode == 0, done.stderr
