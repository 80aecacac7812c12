"""A folder of images, and a cache for datasets that is not the person's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_stores import any_bucket, bucket, faulty, store_servers
from source_world import members

__all__ = ["any_bucket", "bucket", "faulty", "store_servers"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in members():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
