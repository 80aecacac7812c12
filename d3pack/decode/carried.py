"""The backbone that comes with a pack: inside the file, or in a directory next to it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.backbones import cache_home, complete, verify_files, write_list
from d3pack.errors import BackboneError
from d3pack.format import EMBEDDED, FileLock, carried_files
from d3pack.system import (
    ObjectPath,
    disk_full_as_error,
    lock,
    place,
    remove_leftovers,
    replace_folder,
)

if TYPE_CHECKING:
    from d3pack.format import BackboneRef, Pack


def backbone_path(file: str | Path | ObjectPath) -> Path:
    """Return where the backbone of a pack `name.d3m` lies if it is published nowhere else.

    It is a directory of this machine: in the current one if the pack is in an object store.
    """
    where = place(file)
    return (Path(where.name) if isinstance(where, ObjectPath) else where).with_suffix(".backbone")


def local_backbone(file: str | Path, pack: Pack) -> Path | None:
    """Return the directory next to the file, for a pack whose backbone is published nowhere."""
    folder = backbone_path(file)
    return folder if not pack.recipe.backbone.repo and folder.is_dir() else None


def unpack_backbone(pack: Pack) -> Path | None:
    """Return a directory with the backbone that a pack carries; None when it carries none.

    It is unpacked once, into the cache. A damaged copy is replaced.
    """
    if EMBEDDED not in pack.extensions:
        return None
    ref = pack.recipe.backbone
    home = cache_home() / "embedded"
    folder = home / ref.lock[:40]
    if _is_intact(folder, ref):
        return folder
    files = carried_files(pack)
    assert files is not None
    home.mkdir(parents=True, exist_ok=True)
    # one process at a time: another may be about to open what is there
    with disk_full_as_error(), lock(home.with_name("embedded.lock"), wait=True) as locked:
        if _is_intact(folder, ref):  # another process was faster
            return folder
        if locked.held:
            remove_leftovers(home)
        with replace_folder(folder) as temporary:
            for path, data in files.items():  # the recipe's paths, which are checked
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)
            locks = {p: FileLock(len(d), hashlib.sha256(d).hexdigest()) for p, d in files.items()}
            write_list(temporary, replace(ref, files=locks))
    return folder


def _is_intact(folder: Path, ref: BackboneRef) -> bool:
    """Return whether a directory has the locked files; `verify_files` remembers their hashes."""
    if not folder.is_dir():
        return False
    try:
        verify_files(folder, complete(ref, folder))
    except BackboneError:
        return False
    return True
