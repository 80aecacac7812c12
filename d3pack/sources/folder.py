"""A directory with a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources.base import Skip, edge_stamp
from d3pack.sources.images import EXTENSIONS, MAX_BYTES, BadImageError
from d3pack.sources.links import bounds, leads_out, refuse_links
from d3pack.sources.splits import SPLITS, is_hidden, pick_folder

DEPTH = 4  # of folders in a class: Tiny-ImageNet has <class>/images/


class FolderStore:
    """Class folders on disk. Classes are listed one at a time; links that lead out are refused."""

    kind = "folder"

    def __init__(self, root: Path, split: str = "train") -> None:
        self._root = _class_root(root, split)
        self._bounds = bounds(self._root)
        self.refused: list[Skip] = []
        folders = sorted(_folders(self._root))
        refuse_links("class folder", (self._root / name for name in folders), self._root)
        if not folders:
            loose = any(Path(name).suffix.lower() in EXTENSIONS for name in os.listdir(self._root))
            raise SourceError(
                "no class folders" + (", only loose images" if loose else ""),
                hint="make a folder for each class",
            )
        self.keys = tuple(folders)
        self.counts = tuple(sum(1 for _ in self._files(name, refuse=True)) for name in self.keys)
        self._listing = lru_cache(maxsize=4)(self._list)

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._bounds)

    def _files(self, key: str, *, refuse: bool = False) -> Iterator[str]:
        """Yield the relative names of the image files of a class, unsorted."""
        waiting = [("", 0)]
        while waiting:
            prefix, depth = waiting.pop()
            with os.scandir(self._root / key / prefix) as entries:
                for entry in entries:
                    if entry.name[0] == ".":
                        continue
                    name = prefix + entry.name
                    if entry.is_symlink() and not self._inside(Path(entry.path)):
                        if refuse:
                            self.refused.append(
                                Skip(key, name, "a link that leads out of the source")
                            )
                    elif entry.is_dir(follow_symlinks=False):
                        if depth < DEPTH:
                            waiting.append((name + "/", depth + 1))
                    elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                        yield name

    def _list(self, c: int) -> tuple[str, ...]:
        return tuple(sorted(self._files(self.keys[c])))

    def names(self, c: int) -> Sequence[str]:
        return self._listing(c)

    def _path(self, c: int, i: int) -> Path:
        path = self._root / self.keys[c] / self.names(c)[i]
        if not path.is_file():
            raise BadImageError("not a regular file")
        return path

    def read(self, c: int, i: int) -> bytes:
        with open(self._path(c, i), "rb") as file:
            # never more than the file holds: read() allocates what it is asked for
            return file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES + 1))

    def stamp(self, c: int, i: int) -> bytes:
        path = self._root / self.keys[c] / self.names(c)[i]
        if not path.is_file():
            raise OSError("not a regular file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return edge_stamp(os.fstat(file.fileno()).st_size, read_at, path.name)


def holds_classes(root: Path) -> bool:
    """Return whether two folders hold images, whatever archives or tables lie beside them."""
    tops = _folders(root)
    if all(name.casefold() in SPLITS for name in tops):
        return any(not leads_out(root / name, root) and holds_classes(root / name) for name in tops)
    with_images = 0
    for name in tops:
        # what leads out is not walked, and refused where nothing else makes a source
        with_images += not leads_out(root / name, root) and _holds_image(root / name)
        if with_images == 2:
            return True
    return False


def _holds_image(folder: Path) -> bool:
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if any(os.path.splitext(name)[1].lower() in EXTENSIONS for name in files if name[0] != "."):
            return True
    return False


def _class_root(root: Path, split: str) -> Path:
    """Return the directory of the class folders: `root` itself, or the one of a split."""
    if not root.is_dir():
        raise NotFoundError(f"there is no directory {root.name}")
    part = pick_folder(_folders(root), split)
    if part is None:
        return root
    refuse_links("folder", [root / part], root)
    return root / part


def _folders(root: Path) -> list[str]:
    return [e.name for e in os.scandir(root) if e.is_dir() and not is_hidden(e.name)]
