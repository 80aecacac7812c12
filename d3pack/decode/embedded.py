"""A backbone that came with the pack, inside it or beside it: held to its lock like any other."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.backbones import cache_home
from d3pack.codecs import decode_files
from d3pack.errors import BackboneChangedError
from d3pack.pack import EMBEDDED
from d3pack.recipe import directory_revision

if TYPE_CHECKING:
    from d3pack.pack import Pack


def backbone_beside(file: str | Path) -> Path:
    """Where the backbone lies that was trained for a pack: `name.backbone` beside `name.d3m`."""
    return Path(file).with_suffix(".backbone")


def beside(file: str | Path, pack: Pack) -> Path | None:
    """The directory beside the file, for a pack whose backbone has no other home."""
    folder = backbone_beside(file)
    return folder if not pack.recipe.backbone.repo and folder.is_dir() else None


def unpacked(pack: Pack) -> Path | None:
    """The directory of the embedded backbone; None when the pack carries none."""
    coded = pack.extensions.get(EMBEDDED)
    if coded is None:
        return None
    ref = pack.recipe.backbone
    folder = cache_home() / "embedded" / directory_revision(ref.files)
    sizes = {path: lock.size for path, lock in ref.files.items()}
    if all((folder / p).is_file() and (folder / p).stat().st_size == n for p, n in sizes.items()):
        return folder
    files = decode_files(coded)
    found = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    if found != {path: lock.sha256 for path, lock in ref.files.items()}:
        raise BackboneChangedError(
            "the embedded backbone is not the one that the recipe names",
            hint="the pack was put together wrongly: ask its maker for another",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    trial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for path in ref.files:  # names that the recipe has checked; nothing else is written
            (trial / path).parent.mkdir(parents=True, exist_ok=True)
            (trial / path).write_bytes(files[path])
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(trial, folder)
        except OSError:  # another process was quicker: its files have the same hashes
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder
