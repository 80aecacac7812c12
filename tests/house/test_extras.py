"""Packages of extras: the base install works without them, and their lack is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from d3pack.errors import UsageError
from d3pack.system import EXTRAS, missing_extra, require

WITHOUT_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))  # None: importing it fails
"""


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


def test_missing_extra_knows_no_other_packages() -> None:
    assert missing_extra(ImportError("no module", name="nobody.knows")) is None
    assert missing_extra(ImportError("no name")) is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
def test_extras_are_those_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in EXTRAS.values():
        listed = project["optional-dependencies"][extra]
        assert any(requirement.startswith(f"{package}>=") for requirement in listed), package
        assert not any(wish.startswith(f"{package}>=") for wish in project["dependencies"])


@pytest.mark.e2e
def test_base_install_decodes_and_trains_on_a_pack(tmp_path: Path) -> None:
    pack = ROOT / "examples" / "cifar10.d3m"
    code = f"""
from d3pack import D3MDataset, Decoder, read
pack = read({str(pack)!r}).first(1)
assert Decoder(pack).images([0, 1]).shape == (2, 3, 64, 64)
dataset = D3MDataset(pack, cache="cpu")
assert dataset[9][1] == 9
"""
    done = base_install(code, tmp_path)
    assert done.returncode == 0, done.stderr
