"""Source: real images with class names, whatever contains them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from d3pack.errors import SourceError, UsageError
from d3pack.sources.images import BadImageError, decode
from d3pack.sources.names import name_classes

OnError = Literal["skip", "fail"]
BLOCK = 1 << 22
UNCOMPRESSED = frozenset({".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
EDGE = 4096  # bytes that are hashed at each end of a file


@dataclass(frozen=True, slots=True)
class Skip:
    """A file that was left out, and why."""

    class_name: str
    key: str
    reason: str


def random_order(count: int, seed: int, c: int) -> list[int]:
    """Return the numbers of the images of a class in the random order of a seed."""
    rng = np.random.Generator(np.random.Philox(key=[seed, c]))
    order: list[int] = rng.permutation(count).tolist()
    return order


class Store(Protocol):
    """Where the files are. A new kind of source implements these attributes and methods."""

    kind: str
    keys: tuple[str, ...]  # of the classes, as stored: folder names, WordNet ids, label names
    counts: tuple[int, ...]  # files of each class

    @property
    def refused(self) -> Sequence[Skip]:
        """Files that were left out before any was opened."""

    def names(self, c: int) -> Sequence[str]:
        """Return the sorted names of the files of class c."""

    def read(self, c: int, i: int) -> bytes:
        """Return the bytes of file i of class c."""

    def stamp(self, c: int, i: int) -> bytes:
        """Return bytes that change when the file changes, and are the same on every machine."""


def _no_image(keys: Sequence[str], store: Store) -> SourceError:
    """Return the error for classes without an image; the hint depends on the kind of source."""
    reasons = [skip.reason for skip in store.refused if skip.class_name == keys[0]]
    more = f" (and {len(keys) - 1} more)" * (len(keys) > 1)
    if reasons:
        left_out = f"; left out: {len(reasons)}, {reasons[0]}"
        hint = "put the images themselves into it"
    else:
        left_out = ""
        hint = "remove the empty folder, or put images into it"
        if store.kind in {"parquet", "hub"}:
            hint = "no row has this label: take its name out of the label column's features"
    return SourceError(f"class {keys[0]!r} holds no image{more}{left_out}", hint=hint)


def edge_stamp(size: int, read_at: Callable[[int, int], bytes], name: str = "") -> bytes:
    """Return the stamp of a file from its size and both ends.

    Of uncompressed images all bytes count: a change in the middle leaves their ends as they were.

    Args:
        size: bytes of the file.
        read_at: function of (offset, length).
        name: its name, by whose suffix uncompressed images are known.
    """
    if size > 2 * EDGE and os.path.splitext(name)[1].lower() in UNCOMPRESSED:
        contents = hashlib.sha256()
        for at in range(0, size, BLOCK):
            contents.update(read_at(at, min(BLOCK, size - at)))
        return size.to_bytes(8, "little") + contents.digest()
    head = read_at(0, min(size, EDGE))
    tail = read_at(max(size - EDGE, EDGE), EDGE) if size > EDGE else b""
    return size.to_bytes(8, "little") + head + tail


class Source:
    """Classes with names, and their images one at a time: only a listing is kept in memory.

    Attributes:
        kind: where the images are: "folder", "tar", "zip", "webdataset", "parquet" or "hub".
        keys: keys of the classes, as stored.
        classes: their names.
        counts: images of each class.
        refused: how many files were left out before any was opened.
        skipped: files that were left out until now, and why.
        opened_by: the arguments of `open_source` that open it again, where it was opened so.
    """

    def __init__(
        self,
        store: Store,
        *,
        table: Mapping[str, str] | None = None,
        on_error: OnError = "skip",
        first: int | None = None,
        opened_by: Mapping[str, Any] | None = None,
    ) -> None:
        self._store = store
        self._on_error = on_error
        self._fingerprint = ""
        self.kind = store.kind
        self.keys = store.keys[:first]
        self.counts = store.counts[:first]
        empty = [key for key, n in zip(self.keys, self.counts, strict=True) if n == 0]
        if empty:
            raise _no_image(empty, store)
        if len(self.keys) < 2:
            raise SourceError(
                f"the source has {len(self.keys)} class" + "es" * (len(self.keys) != 1),
                hint="a classification dataset needs two: one folder for each class",
            )
        self.classes = name_classes(store.keys, table)[:first]
        self.refused = len(store.refused)
        self.skipped: list[Skip] = []
        self.opened_by = opened_by
        self._seen: set[Skip] = set()
        for skip in store.refused:
            self._skip(skip)

    def address(self) -> Mapping[str, Any]:
        """Return the arguments of `open_source` that open it in another process.

        Raises:
            UsageError: it was not opened so.
        """
        if self.opened_by is None:
            raise UsageError(
                "workers cannot open this source", hint="make it by open_source of an address"
            )
        return self.opened_by

    def skipped_lines(self) -> str:
        """Return class, key and reason of every file that was left out, one a line."""
        return "".join(f"{skip.class_name}\t{skip.key}\t{skip.reason}\n" for skip in self.skipped)

    def _skip(self, skip: Skip) -> None:
        if self._on_error == "fail":
            raise BadImageError(
                f"{skip.class_name}/{skip.key}: {skip.reason}",
                hint="repair or remove it, or skip bad images",
            )
        if skip not in self._seen:
            self._seen.add(skip)
            self.skipped.append(skip)

    def names(self, c: int) -> Sequence[str]:
        """Return the sorted names of the files of class c."""
        return self._store.names(c)

    def load(self, c: int, i: int) -> Image.Image:
        """Return image i of class c as RGB.

        Raises:
            BadImageError: it cannot be used.
        """
        try:
            data = self._store.read(c, i)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode(data)

    def get(self, c: int, i: int) -> Image.Image | None:
        """Return image i of class c, or None if it is bad; raise with `on_error="fail"`."""
        try:
            return self.load(c, i)
        except BadImageError as error:
            self._skip(Skip(self.classes[c], self.names(c)[i], str(error.args[0])))
            return None

    def iter_class(self, c: int) -> Iterator[tuple[str, Image.Image]]:
        """Yield name and image of every usable file of class c."""
        for i, name in enumerate(self.names(c)):
            image = self.get(c, i)
            if image is not None:
                yield name, image

    def fingerprint(self, progress: Callable[[int], None] | None = None) -> str:
        """Return the SHA-256, in hex, of class names, file names and contents.

        Args:
            progress: function of the number of classes that are done.
        """
        if not self._fingerprint:
            total = hashlib.sha256(b"d3pack source 1")
            for c, name in enumerate(self.classes):
                part = hashlib.sha256()
                for i, key in enumerate(self.names(c)):
                    stamp = hashlib.sha256(self._stamp(c, i)).digest()
                    part.update(
                        hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() + stamp
                    )
                total.update(hashlib.sha256(name.encode()).digest() + part.digest())
                if progress is not None:
                    progress(c + 1)
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def _stamp(self, c: int, i: int) -> bytes:
        try:
            return self._store.stamp(c, i)
        except OSError:
            return b"unreadable"
