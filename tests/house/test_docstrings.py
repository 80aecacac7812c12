"""The examples in docstrings: they run, and the public surface has them."""

from __future__ import annotations

import doctest
import inspect
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from house_imports import dotted, modules
from places import ROOT

import d3pack

EXAMPLES = [path for path in modules() if ">>> " in path.read_text(encoding="utf-8")]
SURFACE = (
    "d3pack.format.read",
    "d3pack.format.write",
    "d3pack.format.Pack",
    "d3pack.decode.Decoder",
    "d3pack.dataset.D3MDataset",
    "d3pack.encode.encode",
    "d3pack.evaluate.evaluate",
    "d3pack.train.train_backbone",
    "d3pack.hub.push",
    "d3pack.hub.pull",
    "d3pack.errors.D3MError",
)


@pytest.mark.heavy
@pytest.mark.parametrize("path", EXAMPLES, ids=dotted)
def test_examples_of_docstrings_give_what_they_show(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    pack = d3pack.read(ROOT / "examples" / "cifar10.d3m")
    d3pack.write(pack.first(10), tmp_path / "cifar10.d3m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"d3pack": d3pack}
    result = doctest.testmod(import_module(dotted(path)), optionflags=flags, extraglobs=names)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", SURFACE)
def test_public_surface_is_documented(name: str) -> None:
    """Arguments, results, errors and an example: a stranger can work from them."""
    module, _, attribute = name.rpartition(".")
    thing = getattr(import_module(module), attribute)
    text = inspect.getdoc(thing) or ""
    assert "Example:\n" in text
    assert ">>> " in text
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert "Args:\n" in text
        assert "Raises:\n" in text
        if signature.return_annotation not in ("None", None):
            assert "Returns:\n" in text
        for parameter in signature.parameters:
            assert f"    {parameter}: " in text, parameter
