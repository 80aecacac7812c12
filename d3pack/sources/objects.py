"""Class folders in an object store, and the files of one."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from d3pack.errors import StorageError
from d3pack.sources.archive import IndexedStore, TreeIndex
from d3pack.sources.folder import DEPTH
from d3pack.sources.images import EXTENSIONS, MAX_BYTES
from d3pack.sources.spill import spilled
from d3pack.sources.splits import SPLITS, below, is_hidden
from d3pack.system import ObjectFile, ObjectInfo, ObjectPath


class ObjectTree(IndexedStore):
    """A folder for each class. Names, sizes and ETags come from listings."""

    kind = "folder"

    def __init__(self, root: ObjectPath, split: str = "train") -> None:
        index = TreeIndex(split)
        for path in walk(root, DEPTH + 2):
            info = path.stat()
            index.add(below(path, root).as_posix(), _number(info), info.st_size)
        super().__init__(index)
        self._root = root / "/".join(index.root) if index.root else root

    def read(self, c: int, i: int) -> bytes:
        rows = self._rows[c]
        path = self._root / f"{self.keys[c]}/{rows.names[i]}"
        return spilled((str(path), rows.places[i]), lambda: _read(path, rows.places[i]))

    def stamp(self, c: int, i: int) -> bytes:
        rows = self._rows[c]
        return rows.sizes[i].to_bytes(8, "little") + rows.places[i].to_bytes(8, "little")


def _number(info: ObjectInfo) -> int:
    """Return what stands for the bytes of an object, in the room that an index has."""
    tag = f"{info.st_size} {info.tag}".encode()
    return int.from_bytes(blake2b(tag, digest_size=8).digest(), "little")


def _read(path: ObjectPath, number: int) -> bytes:
    file = ObjectFile(path)
    if _number(ObjectInfo(file.size, file.tag, False)) != number:
        raise StorageError(
            f"{path} changed since the source was listed",
            code="E_STORAGE_BYTES",
            hint="run it again",
        )
    return file.read(0, MAX_BYTES + 1)


def walk(folder: ObjectPath, depth: int) -> Iterator[ObjectPath]:
    """Yield the objects below a folder, one folder's listing at a time."""
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_file():
            yield path
        elif depth > 1:
            yield from walk(path, depth - 1)


def holds_object_classes(root: ObjectPath) -> bool:
    """Return whether two folders hold images, as `holds_classes` does for local ones."""
    tops = [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if all(path.name.casefold() in SPLITS for path in tops):
        return any(map(holds_object_classes, tops))
    with_images = 0
    for top in tops:
        with_images += any(path.suffix.lower() in EXTENSIONS for path in walk(top, DEPTH + 1))
        if with_images == 2:
            return True
    return False
