"""A tiny backbone and packs on it; nothing is written outside the test's own folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_packs import tiny_pack
from tiny_backbones import tiny_dit

from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder
from d3pack.format import Pack


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("d3pack.dataset.images._SAID", set())  # as in a new process


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dit(tmp_path_factory.mktemp("backbone") / "dit")


@pytest.fixture(scope="session")
def pack(backbone: Path) -> Pack:
    """21 images of 3 classes, groups of 4, soft labels."""
    return tiny_pack(backbone, labels=True)


@pytest.fixture(scope="session")
def expected(pack: Pack, backbone: Path) -> torch.Tensor:
    """What the decoder itself makes of the pack: all images in order."""
    with Decoder(pack, path=backbone) as decoder:
        images = decoder.images(range(len(pack)))
    assert len({image.numpy().tobytes() for image in images}) == len(pack)
    return images


@pytest.fixture
def dataset(pack: Pack, backbone: Path) -> D3MDataset:
    return D3MDataset(pack, backbone=backbone, quiet=True)
