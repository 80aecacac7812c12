"""The canonical writer: one Pack, one sequence of bytes."""

from __future__ import annotations

import os

from d3pack.format import container
from d3pack.format.canonical import dumps, plain
from d3pack.format.carried import carried_files
from d3pack.format.pack import Pack
from d3pack.format.reader import read
from d3pack.system import replace_file


def pack_bytes(pack: Pack) -> bytes:
    """The bytes of the file; what our own reader would refuse is never handed out."""
    manifest = pack.manifest
    placed = container.slots(plain(manifest["sections"]), len(pack.classes))
    data = b"".join((
        container.header(dumps(manifest), placed), *container.body(placed, pack.sections())
    ))  # fmt: skip
    carried_files(read(data))
    return data


def write(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Write a pack so that a crash at any moment leaves the old file or the new one.

    A link is followed; a device or a pipe is refused, for it would be replaced by a file.
    """
    replace_file(path, pack_bytes(pack))
