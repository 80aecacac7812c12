"""A backbone that came with the pack, inside it or beside it: held to its lock like any other."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.backbones import cache_home, verify_files
from d3pack.errors import BackboneError
from d3pack.format import EMBEDDED, carried_files
from d3pack.format.recipe import directory_revision

if TYPE_CHECKING:
    from d3pack.format.pack import Pack


def backbone_path(file: str | Path) -> Path:
    """Where the backbone lies that was trained for a pack: `name.backbone` beside `name.d3m`."""
    return Path(file).with_suffix(".backbone")


def local_backbone(file: str | Path, pack: Pack) -> Path | None:
    """The directory beside the file, for a pack whose backbone has no other home."""
    folder = backbone_path(file)
    return folder if not pack.recipe.backbone.repo and folder.is_dir() else None


def unpack_backbone(pack: Pack) -> Path | None:
    """The directory of the embedded backbone; None when the pack carries none."""
    if EMBEDDED not in pack.extensions:
        return None
    ref = pack.recipe.backbone
    folder = cache_home() / "embedded" / directory_revision(ref.files)
    if folder.is_dir():
        try:
            verify_files(folder, ref)  # remembered: whoever opens it does not hash again
        except BackboneError:  # damaged since: the pack has the right bytes
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    files = carried_files(pack)
    assert files is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    trial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for path, data in files.items():  # the recipe's own names, which it has checked
            (trial / path).parent.mkdir(parents=True, exist_ok=True)
            (trial / path).write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(trial, folder)
        except OSError:  # another process was quicker: its files have the same hashes
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder
