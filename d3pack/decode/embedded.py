"""A backbone that came with the pack, inside it or beside it: held to its lock like any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.backbones import cache_home, verify_files
from d3pack.errors import BackboneError
from d3pack.format import EMBEDDED, carried_files
from d3pack.format.recipe import directory_revision
from d3pack.system import disk_full_as_error, lock, remove_leftovers, replace_folder

if TYPE_CHECKING:
    from d3pack.format import BackboneRef
    from d3pack.format.pack import Pack


def backbone_path(file: str | Path) -> Path:
    """Where the backbone lies that was trained for a pack: `name.backbone` beside `name.d3m`."""
    return Path(file).with_suffix(".backbone")


def local_backbone(file: str | Path, pack: Pack) -> Path | None:
    """The directory beside the file, for a pack whose backbone has no other home."""
    folder = backbone_path(file)
    return folder if not pack.recipe.backbone.repo and folder.is_dir() else None


def unpack_backbone(pack: Pack) -> Path | None:
    """Return the directory of the embedded backbone; None when the pack carries none."""
    if EMBEDDED not in pack.extensions:
        return None
    ref = pack.recipe.backbone
    home = cache_home() / "embedded"
    folder = home / directory_revision(ref.files)
    if _intact(folder, ref):
        return folder
    files = carried_files(pack)
    assert files is not None
    home.mkdir(parents=True, exist_ok=True)
    # one process at a time: another may be about to open what is there
    with disk_full_as_error(), lock(home.with_name("embedded.lock"), wait=True) as locked:
        if _intact(folder, ref):  # another process was faster
            return folder
        if locked.held:
            remove_leftovers(home)
        with replace_folder(folder) as temporary:
            for path, data in files.items():  # the recipe's own names, which it has checked
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)
    return folder


def _intact(folder: Path, ref: BackboneRef) -> bool:
    """Whether the directory has the right files; their hashes are remembered for who opens it."""
    if not folder.is_dir():
        return False
    try:
        verify_files(folder, ref)
    except BackboneError:  # damaged since: the pack has the right bytes
        return False
    return True
