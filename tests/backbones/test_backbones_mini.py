"""Where the weights of `mini` are: in a checkout, in d3pack-mini, or nowhere."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from places import ROOT

from d3pack.backbones import mini_directory, resolve
from d3pack.errors import BackboneError


def weights(home: Path) -> Path:
    folder = home / "d3pack_mini" / "weights"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where d3pack is, away from its checkout."""
    site = tmp_path / "site"
    monkeypatch.setattr(resolve, "__file__", str(site / "d3pack" / "backbones" / "resolve.py"))
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    return site


def test_checkout_has_its_own() -> None:
    assert mini_directory() == ROOT / "mini" / "d3pack_mini" / "weights"


def test_installation_takes_those_of_the_package(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = weights(installed)
    spec = ModuleSpec("d3pack_mini", None, origin=str(folder.parent / "__init__.py"))
    monkeypatch.setattr(resolve, "find_spec", lambda name: spec if name == spec.name else None)
    assert mini_directory() == folder


@pytest.mark.usefixtures("installed")
def test_missing_weights_name_the_extra_and_their_terms() -> None:
    with pytest.raises(BackboneError, match="weights of mini are not installed") as raised:
        mini_directory()
    assert raised.value.code == "E_BACKBONE_MISSING"
    assert "'d3pack[mini]' (non-commercial research)" in raised.value.hint
