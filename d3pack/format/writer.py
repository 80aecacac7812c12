"""The canonical writer: one pack, one sequence of bytes."""

from __future__ import annotations

import os

from d3pack.format import container
from d3pack.format.canonical import dumps
from d3pack.format.pack import Pack, carried_files
from d3pack.format.reader import read
from d3pack.system import ObjectPath, place, replace_file


def pack_bytes(pack: Pack) -> bytes:
    """Return the bytes of the file of a pack.

    They are read again before they are returned, so an invalid pack never leaves the writer.

    Raises:
        InvalidPackError: the pack breaks a rule of the format.
        UsageError: a tensor has a dtype or shape that no pack can hold.
    """
    header = container.build_header(dumps(pack.manifest), pack.placement())
    data = b"".join([header, *container.data_parts(pack.sections())])
    carried_files(read(data))
    return data


def write(pack: Pack, path: str | os.PathLike[str] | ObjectPath) -> None:
    """Write a pack so that a crash at any moment leaves the old file or the new one.

    Args:
        pack: what to write.
        path: where, or an address such as `s3://bucket/x.d3m`. A link is followed, and the
            permissions of an old file are kept.

    Raises:
        InvalidPackError: the pack breaks a rule of the format; nothing is written.
        UsageError: `path` is a folder, a device or a pipe.
        NotFoundError: the folder of `path` does not exist.
        NoSpaceError: the disk is full.
        StorageError: the object store cannot be reached, or refuses.

    Example:
        >>> import d3pack
        >>> pets = d3pack.read("cifar10.d3m").select(["cat", "dog"])
        >>> d3pack.write(pets, "pets.d3m")
        >>> d3pack.read("pets.d3m") == pets
        True
    """
    replace_file(place(path), pack_bytes(pack))
