"""The folders of an export: what they hold and lack, found out one class at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from d3pack.decode.pairs import Pair, Pairs
from d3pack.errors import UsageError
from d3pack.system import ObjectPath

_NUMBER = re.compile(r"[0-9]{5,9}")


@dataclass(frozen=True, slots=True)
class Tree:
    """Images in a folder for each class, of which one process writes some units of equal size.

    Nothing that grows with the number of images is kept: a pack of few bytes may promise billions.
    """

    output: Path | ObjectPath
    folders: Sequence[str]  # of all classes of the pack
    suffix: str
    pairs: Pairs  # what is wanted
    units: range  # which are to be written
    size: int  # images of a unit

    def file_name(self, index: int) -> str:
        """Return the name of an image within its folder."""
        return f"{index:05d}.{self.suffix}"

    def present(self) -> int:
        """Return how many images of the units are there; nothing else must be.

        Raises:
            UsageError: there are other images or folders.
        """
        places = {c: place for place, c in enumerate(self.pairs.classes)}
        present = extra = 0
        for c in self._begun():
            first = places[c] * self.pairs.per_class if c in places else None
            for index in self._indices(c):
                if first is None or index >= self.pairs.per_class:
                    extra += 1
                else:
                    present += (first + index) // self.size in self.units
        if extra:
            raise UsageError(
                f"{self.output} holds {extra} images of an earlier export that this one lacks",
                hint="choose an empty folder",
            )
        return present

    def missing(self) -> Iterator[Pair]:
        """Yield the images of the units that are not there; a byte an image of one class is kept.

        The folder of a class is made when its first image is yielded.
        """
        each, now, there = self.pairs.per_class, -1, bytearray()
        for unit in self.units:
            for number in range(unit * self.size, min((unit + 1) * self.size, len(self.pairs))):
                place, index = divmod(number, each)
                if place != now:
                    now, there = place, self._enter(self.pairs.classes[place])
                if not there[index]:
                    yield self.pairs.classes[place], index

    def _enter(self, c: int) -> bytearray:
        """Make the folder of a class, and return which of its images are there."""
        there = bytearray(self.pairs.per_class)
        (self.output / self.folders[c]).mkdir(exist_ok=True)
        if (self.output / self.folders[c]).is_dir():  # in an object store, folders are not made
            for index in self._indices(c):
                there[index : index + 1] = b"\1"
        return there

    def _begun(self) -> list[int]:
        """Return the classes that have a folder."""
        classes = {folder: c for c, folder in enumerate(self.folders)}
        begun = []
        for name, is_folder in _entries(self.output):
            if is_folder and name in classes:
                begun.append(classes[name])
            else:
                self._check_foreign(name, is_folder)
        return sorted(begun)

    def _indices(self, c: int) -> Iterator[int]:
        """Yield the numbers of the images in the folder of a class."""
        folder = self.folders[c]
        for name, is_folder in _entries(self.output / folder):
            stem, _, suffix = name.partition(".")
            own = suffix == self.suffix and _NUMBER.fullmatch(stem) and not is_folder
            if own and name == self.file_name(int(stem)):
                yield int(stem)
            else:
                self._check_foreign(f"{folder}/{name}", is_folder)

    def _check_foreign(self, name: str, is_folder: bool) -> None:
        """Refuse what readers of folders would take for a class or an image."""
        path = PurePath(name)
        if path.name.startswith("."):  # readers pass it over
            return
        if is_folder or path.suffix.lower() in Image.registered_extensions():
            kind = "a folder" if is_folder else "an image"
            raise UsageError(
                f"{self.output} holds {kind} that is not of this export: {name!r}",
                hint="move it away, or choose an empty folder",
            )


def _entries(folder: Path | ObjectPath) -> Iterator[tuple[str, bool]]:
    """Yield the names in a folder, and whether they are those of folders."""
    if isinstance(folder, ObjectPath):
        yield from ((entry.name, entry.is_dir()) for entry in folder.iterdir())
        return
    with os.scandir(folder) as entries:
        yield from ((entry.name, entry.is_dir()) for entry in entries)
