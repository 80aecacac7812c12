"""A small world to encode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from encode_world import make_tree
from tiny_backbones import tiny_sd


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A backbone and a source; the cache of teachers lies apart from the person's own."""
    folder = tmp_path_factory.mktemp("command")
    tiny_sd(folder / "sd")
    make_tree(folder / "source")
    before = os.environ.get("D3PACK_HOME")
    os.environ["D3PACK_HOME"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["D3PACK_HOME"]
    else:
        os.environ["D3PACK_HOME"] = before
