"""Backbones to damage, and a memory of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_backbones import tiny_dit, tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "sd": tiny_sd(root / "sd", tokenizer="vocab"),
        "dit": tiny_dit(root / "dit"),
        "sdxl": tiny_sdxl(root / "sdxl"),
    }


@pytest.fixture
def sd(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["sd"], tmp_path / "sd"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
