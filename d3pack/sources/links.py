"""Links in a folder of somebody else: they must not choose among all files of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from d3pack.errors import SourceError
from d3pack.system import ObjectPath


def bounds(folder: Path) -> Path:
    """Return the real folder in which everything that a folder links to has to lie.

    It is the folder itself; in a cache of the Hub, whose snapshots link to blobs, the repository's.
    """
    real = Path(os.path.realpath(folder))
    for part in (real, *real.parents):
        if part.parent.name == "snapshots" and (part.parent.parent / "blobs").is_dir():
            return part.parent.parent
    return real


def leads_out(path: Path | ObjectPath, folder: Path | ObjectPath) -> bool:
    """Return whether a path in a folder is a link to something outside of it."""
    if not isinstance(path, Path) or not isinstance(folder, Path):
        return False
    return not Path(os.path.realpath(path)).is_relative_to(bounds(folder))


def refuse_links(what: str, paths: Iterable[Path | ObjectPath], folder: Path | ObjectPath) -> None:
    """Refuse paths in a folder that are links to something outside of it.

    Raises:
        SourceError: one of them is.
    """
    for path in paths:
        if leads_out(path, folder):
            raise SourceError(
                f"{what} {path.name!r} is a link that leads out of the source",
                hint="copy what it points to, or give that as the source",
            )
