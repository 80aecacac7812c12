"""A tar or zip of class folders, read in place: nothing is unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import stat
import tarfile
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from d3pack.errors import D3MError, SourceError
from d3pack.sources.base import Skip, edge_stamp
from d3pack.sources.images import EXTENSIONS, MAX_BYTES, BadImageError
from d3pack.sources.spill import spilled
from d3pack.sources.splits import is_hidden, pick_folder
from d3pack.system import ObjectFile, ObjectPath, first_line

MAX_RATIO = 200  # a tar that grows by more when it is uncompressed is a bomb, not a dataset
SLACK = 1 << 30
ZIP_BLOCK = 1 << 17  # bytes of one request into a zip, whose members are read in any order
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
TAR_SUFFIXES = frozenset({".tar", *_OPENERS})


@dataclass(slots=True)
class _Rows:
    """The files of one class: names and two flat arrays, so that a million fit in memory."""

    names: list[str] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, name: str, place: int, size: int) -> None:
        self.names.append(name)
        self.places.append(place)
        self.sizes.append(size)

    def sort(self) -> None:
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        # of two members of one name the later one counts, as when the archive is unpacked
        following = [*(self.names[i] for i in order[1:]), None]
        order = [i for i, name in zip(order, following, strict=True) if self.names[i] != name]
        self.names = [self.names[i] for i in order]
        self.places = array("Q", (self.places[i] for i in order))
        self.sizes = array("Q", (self.sizes[i] for i in order))


class TarBytes:
    """The bytes of a tar by offset: of the file, or of a temporary one if it is compressed."""

    def __init__(self, path: Path | ObjectPath) -> None:
        self._path = path
        self._object = ObjectFile(path) if isinstance(path, ObjectPath) else None
        self._spool: mmap.mmap | None = None
        opener = _OPENERS.get(path.suffix.lower())
        if opener is not None:
            limit = path.stat().st_size * MAX_RATIO + SLACK
            with (
                tempfile.TemporaryFile() as spool,
                self._stored() as file,
                opener(file, "rb") as packed,
            ):
                while block := packed.read(1 << 22):
                    spool.write(block)
                    if spool.tell() > limit:
                        raise SourceError(f"{path.name} grows beyond {MAX_RATIO} times its size")
                spool.flush()
                self._spool = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)

    def _stored(self) -> IO[bytes]:
        """Return the tar as it is stored."""
        return self._path.open("rb") if self._object is None else self._object.stream()

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Yield the uncompressed tar as a file."""
        if self._spool is not None:
            self._spool.seek(0)
            yield cast(IO[bytes], self._spool)
        else:
            with self._stored() as file:
                yield file

    def members(self) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
        """Yield members in their order, each with a function to read it before the next."""

        def content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
            file.seek(member.offset_data)
            return file.read(member.size)

        with self.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                yield member, partial(content, file, member)
                tar.members = []  # type: ignore[attr-defined]

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of the uncompressed tar."""
        if self._spool is not None:
            return self._spool[offset : offset + length]
        if (remote := self._object) is not None:
            key = (str(self._path), remote.tag, offset, length)
            return spilled(key, lambda: remote.read(offset, length))
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def stamp(self, offset: int, size: int, name: str) -> bytes:
        """Return the stamp of a member; of an object by its ETag, without a request."""
        if self._object is not None:
            return f"{self._object.tag} {offset} {size}".encode()
        return edge_stamp(size, lambda at, n: self.read_at(offset + at, n), name)


class TreeIndex:
    """Collects the members of an archive into classes, by their folders."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._folders: dict[tuple[str, ...], _Rows] = {}
        self.root: tuple[str, ...] = ()  # the folders above those of the classes
        self.refused: list[Skip] = []

    def add(self, name: str, place: int, size: int) -> None:
        """Add a member; hidden ones, and files that are no images, are left out."""
        path = PurePosixPath(name)
        parts = tuple(part for part in path.parts if part != ".")
        if path.is_absolute() or ".." in parts:
            self.refused.append(Skip("", name, "its path leads out of the archive"))
        elif len(parts) < 2 or any(map(is_hidden, parts)):
            return
        elif path.suffix.lower() in EXTENSIONS:
            self._folders.setdefault(parts[:-1], _Rows()).add(parts[-1], place, size)

    def classes(self) -> dict[str, _Rows]:
        """Return rows by class key, below the folders that all members have in common."""
        folders = self._folders
        while folders and len({f[0] for f in folders}) == 1 and all(len(f) > 1 for f in folders):
            pick_folder({f[0] for f in folders}, self._split)  # raises if it is another split
            self.root += next(iter(folders))[:1]
            folders = {f[1:]: rows for f, rows in folders.items()}
        part = pick_folder({f[0] for f in folders}, self._split)
        if part is not None:
            self.root += (part,)
            folders = {f[1:]: r for f, r in folders.items() if f[0] == part and len(f) > 1}
        classes: dict[str, _Rows] = {}
        for folder, rows in folders.items():
            merged = classes.setdefault(folder[0], _Rows())
            for name, place, size in zip(rows.names, rows.places, rows.sizes, strict=True):
                merged.add("/".join((*folder[1:], name)), place, size)
        for rows in classes.values():
            rows.sort()
        if not classes:
            raise SourceError("the archive holds no class folders with images")
        return dict(sorted(classes.items()))


class IndexedStore:
    """Classes and names from an index: of a tar, a zip, or a tree of objects."""

    def __init__(self, index: TreeIndex) -> None:
        classes = index.classes()
        self.keys = tuple(classes)
        self._rows = tuple(classes.values())
        self.counts = tuple(len(rows.names) for rows in self._rows)
        self.refused = index.refused

    def names(self, c: int) -> Sequence[str]:
        return self._rows[c].names


class TarStore(IndexedStore):
    """A tar of class folders, compressed or not."""

    kind = "tar"

    def __init__(self, path: Path | ObjectPath, split: str = "train") -> None:
        index = TreeIndex(split)
        try:
            self._bytes = TarBytes(path)
            for member, _ in self._bytes.members():
                if member.isreg() and not member.issparse():
                    index.add(member.name, member.offset_data, member.size)
                elif not member.isdir():
                    index.refused.append(Skip("", member.name, "a link or a special file"))
        except DAMAGE as error:
            raise SourceError(f"{path.name} is not a readable tar: {error}") from error
        super().__init__(index)

    def read(self, c: int, i: int) -> bytes:
        rows = self._rows[c]
        return self._bytes.read_at(rows.places[i], min(rows.sizes[i], MAX_BYTES + 1))

    def stamp(self, c: int, i: int) -> bytes:
        rows = self._rows[c]
        return self._bytes.stamp(rows.places[i], rows.sizes[i], rows.names[i])


class ZipStore(IndexedStore):
    """A zip of class folders."""

    kind = "zip"

    def __init__(self, path: Path | ObjectPath, split: str = "train") -> None:
        index = TreeIndex(split)
        self._object = ObjectFile(path) if isinstance(path, ObjectPath) else None
        try:
            self._zip = zipfile.ZipFile(
                cast(Any, path if self._object is None else self._object.stream(ZIP_BLOCK))
            )
        except D3MError:  # of the store: not a fault of the archive
            raise
        # of versions that nobody has, of names that are not UTF-8, of damage
        except Exception as error:
            raise SourceError(f"{path.name} is not a readable zip: {error}") from error
        self._infos = self._zip.infolist()
        for place, info in enumerate(self._infos):
            if info.filename.endswith("/"):  # unlike is_dir, for names that are empty, too
                continue
            if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                index.refused.append(Skip("", info.filename, "a link or an encrypted file"))
            else:
                index.add(info.filename, place, info.file_size)
        super().__init__(index)

    def read(self, c: int, i: int) -> bytes:
        place = self._rows[c].places[i]
        if self._object is None:
            return self._unpacked(place)
        key = (str(self._object.path), self._object.tag, place)
        return spilled(key, lambda: self._unpacked(place))

    def _unpacked(self, place: int) -> bytes:
        info = self._infos[place]
        try:
            with self._zip.open(info) as file:
                return file.read(min(info.file_size, MAX_BYTES) + 1)
        except D3MError:  # of the store: not a fault of the image
            raise
        # zipfile raises many types (bad CRC, unknown method, truncated stream)
        except Exception as error:
            raise BadImageError(f"cannot be unpacked: {first_line(error)}") from error

    def stamp(self, c: int, i: int) -> bytes:
        info = self._infos[self._rows[c].places[i]]
        return info.file_size.to_bytes(8, "little") + info.CRC.to_bytes(4, "little")
