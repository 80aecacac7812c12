"""Source: real images with class names, whatever they lie in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from d3pack.errors import SourceError
from d3pack.sources.images import BadImageError, decode
from d3pack.sources.names import name_classes

OnError = Literal["skip", "fail"]
BLOCK = 1 << 22
PLAIN = frozenset({".bmp", ".ppm", ".pgm", ".tif", ".tiff"})  # pixels lie there as they are
EDGE = 4096  # bytes hashed at both ends of a file: all of a small one, enough of a large one


@dataclass(frozen=True, slots=True)
class Skip:
    """One file that was left out, and why."""

    class_name: str
    key: str
    reason: str


class Store(Protocol):
    """Where the files lie. A new kind of source implements these five and is done."""

    kind: str
    keys: tuple[str, ...]  # class keys as stored: folder names, WordNet ids, label names
    counts: tuple[int, ...]

    @property
    def refused(self) -> Sequence[Skip]:
        """Files that were left out before any was opened."""

    def names(self, c: int) -> Sequence[str]:
        """Sorted names of the files of class c."""

    def read(self, c: int, i: int) -> bytes:
        """The bytes of file i of class c."""

    def stamp(self, c: int, i: int) -> bytes:
        """Changes when the file changes; the same on every machine."""


def _no_image(keys: Sequence[str], store: Store) -> SourceError:
    """For classes without an image: what is left to do depends on where they come from."""
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


def edges(size: int, read_at: Callable[[int, int], bytes], name: str = "") -> bytes:
    """Stamp of a file from its size and both ends. `read_at(offset, length)`.

    Compressed images change at their ends too; of uncompressed ones, by their `name`, all counts.
    """
    if size > 2 * EDGE and os.path.splitext(name)[1].lower() in PLAIN:
        whole = hashlib.sha256()
        for at in range(0, size, BLOCK):
            whole.update(read_at(at, min(BLOCK, size - at)))
        return size.to_bytes(8, "little") + whole.digest()
    head = read_at(0, min(size, EDGE))
    tail = read_at(max(size - EDGE, EDGE), EDGE) if size > EDGE else b""
    return size.to_bytes(8, "little") + head + tail


class Source:
    """Classes with names, and their images one at a time: memory holds a listing, never the set."""

    def __init__(
        self,
        store: Store,
        *,
        table: Mapping[str, str] | None = None,
        on_error: OnError = "skip",
        first: int | None = None,
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
        self._seen: set[Skip] = set()
        for skip in store.refused:
            self._skip(skip)

    def _skip(self, skip: Skip) -> None:
        if self._on_error == "fail":
            raise BadImageError(
                f"{skip.class_name}/{skip.key}: {skip.reason}",
                hint="mend or remove it, or pass --on-error skip",
            )
        if skip not in self._seen:
            self._seen.add(skip)
            self.skipped.append(skip)

    def names(self, c: int) -> Sequence[str]:
        """Names of the files of class c, sorted."""
        return self._store.names(c)

    def load(self, c: int, i: int) -> Image.Image:
        """Image i of class c as RGB; BadImageError when it cannot be used."""
        try:
            data = self._store.read(c, i)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode(data)

    def get(self, c: int, i: int) -> Image.Image | None:
        """Like `load`; a bad image is None and recorded, or an error under `on_error="fail"`."""
        try:
            return self.load(c, i)
        except BadImageError as error:
            self._skip(Skip(self.classes[c], self.names(c)[i], str(error.args[0])))
            return None

    def iter_class(self, c: int) -> Iterator[tuple[str, Image.Image]]:
        """(name, image) of every usable file of class c."""
        for i, name in enumerate(self.names(c)):
            image = self.get(c, i)
            if image is not None:
                yield name, image

    def fingerprint(self, tell: Callable[[int], None] | None = None) -> str:
        """Hex sha256 over class names, file names and contents (size and ends of each).

        `tell` hears how many classes are done.
        """
        if not self._fingerprint:
            whole = hashlib.sha256(b"d3pack source 1")
            for c, name in enumerate(self.classes):
                part = hashlib.sha256()
                for i, key in enumerate(self.names(c)):
                    stamp = hashlib.sha256(self._stamp(c, i)).digest()
                    part.update(
                        hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() + stamp
                    )
                whole.update(hashlib.sha256(name.encode()).digest() + part.digest())
                if tell is not None:
                    tell(c + 1)
            self._fingerprint = whole.hexdigest()
        return self._fingerprint

    def _stamp(self, c: int, i: int) -> bytes:
        try:
            return self._store.stamp(c, i)
        except OSError:
            return b"unreadable"
