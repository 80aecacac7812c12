"""WebDataset shards: tar files in which `000042.jpg` and `000042.cls` belong together."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources.archive import DAMAGE, TAR_SUFFIXES, TarBytes
from d3pack.sources.base import Skip
from d3pack.sources.images import EXTENSIONS, MAX_BYTES
from d3pack.sources.links import leads_out, refuse_links
from d3pack.sources.names import read_table
from d3pack.system import ObjectPath, place

NAME_TABLES = ("classnames.txt", "classes.txt", "class_names.json", "classnames.json")
MAX_LABEL = 1 << 20  # bytes; larger label members are not read
_BRACES = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")


def expand(address: str) -> list[Path | ObjectPath]:
    """Return the shards of `train-{0000..0012}.tar`, of a directory, or one tar, in order."""
    braces = _BRACES.match(address)
    if braces:
        head, low, high, tail = braces.groups()
        if int(high) - int(low) > 1_000_000:
            raise SourceError("the range of shards is too long")
        paths = [place(f"{head}{i:0{len(low)}d}{tail}") for i in range(int(low), int(high) + 1)]
    elif (folder := place(address)).is_dir():
        tars = (path for path in folder.iterdir() if path.suffix.lower() in TAR_SUFFIXES)
        paths = sorted(tars, key=str)
    else:
        paths = [folder]
    absent = [path.name for path in paths if not path.is_file()]
    if absent or not paths:
        raise NotFoundError(
            f"{len(absent)} shards are missing, first {absent[0]}" if absent else "no shards"
        )
    if len(paths) > 1 or paths[0] != place(address):  # who names one file means that one
        for path in paths:
            refuse_links("shard", [path], path.parent)
    return paths


def looks_like_shards(path: Path | ObjectPath) -> bool:
    """Return whether the first members of a tar are images with labels, and not a tree."""
    images: set[str] = set()
    labels: set[str] = set()
    try:
        for count, (member, content) in enumerate(TarBytes(path).members()):
            name = PurePosixPath(member.name)
            base, _, ext = name.name.partition(".")
            if ext == "cls":
                return True
            # in a tree a .json may lie beside an image; without folders it is a label
            if len(name.parts) == 1 and member.isreg():
                if f".{ext.lower()}" in EXTENSIONS:
                    images.add(base)
                elif ext == "json" and member.size <= MAX_LABEL and _label(ext, content()):
                    labels.add(base)
                if images & labels:
                    return True
            if count > 64:
                break
    except DAMAGE as error:
        raise SourceError(f"{path.name} is not a readable tar: {error}") from error
    return False


class ShardStore:
    """Shards by an index of (shard, offset, size) of each image."""

    kind = "webdataset"

    def __init__(self, paths: Sequence[Path | ObjectPath]) -> None:
        self._shards: list[TarBytes] = []
        self.refused: list[Skip] = []
        rows: dict[str, list[tuple[str, int, int, int]]] = {}
        for shard, path in enumerate(paths):
            try:
                self._shards.append(TarBytes(path))
                for label, name, offset, size in self._samples(path.name, self._shards[shard]):
                    rows.setdefault(label, []).append((name, shard, offset, size))
            except DAMAGE as error:
                raise SourceError(f"{path.name} is not a readable shard: {error}") from error
        if not rows:
            raise SourceError("the shards hold no image with a .cls or .json label beside it")
        self.keys = _class_keys(list(rows), paths[0].parent)
        ordered = [sorted(rows[key]) for key in sorted(rows, key=_label_order)]
        self._names = [[row[0] for row in part] for part in ordered]
        self._places = [array("Q", (v for row in part for v in row[1:])) for part in ordered]
        self.counts = tuple(len(names) for names in self._names)

    def _samples(self, shard: str, tar: TarBytes) -> Iterator[tuple[str, str, int, int]]:
        """Yield label, name, offset and size of every labelled image of a shard."""
        stem, image, label = "", None, None
        for member, content in tar.members():
            if not member.isreg():
                continue
            path = PurePosixPath(member.name)
            base, _, ext = path.name.partition(".")
            sample = str(path.with_name(base))
            if sample != stem:
                if image:
                    self.refused.append(Skip("", f"{shard}:{stem}", "no label beside it"))
                stem, image, label = sample, None, None
            if f".{ext.lower()}" in EXTENSIONS:
                image = (f"{shard}:{member.name}", member.offset_data, member.size)
            elif ext in {"cls", "json"} and member.size <= MAX_LABEL:
                label = _label(ext, content()) or label  # a .json may have no label
            if image and label is not None:
                yield (label, *image)
                image = None
        if image:
            self.refused.append(Skip("", f"{shard}:{stem}", "no label beside it"))

    def names(self, c: int) -> Sequence[str]:
        return self._names[c]

    def _place(self, c: int, i: int) -> tuple[int, int, int]:
        shard, offset, size = self._places[c][3 * i : 3 * i + 3]
        return shard, offset, size

    def read(self, c: int, i: int) -> bytes:
        shard, offset, size = self._place(c, i)
        return self._shards[shard].read_at(offset, min(size, MAX_BYTES + 1))

    def stamp(self, c: int, i: int) -> bytes:
        shard, offset, size = self._place(c, i)
        return self._shards[shard].stamp(offset, size, self._names[c][i])


def _label(ext: str, data: bytes) -> str | None:
    try:
        text = data.decode("utf-8").strip()
        if ext == "cls":
            return text or None
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in ("label", "class", "cls", "class_name"):
        if isinstance(value, dict) and isinstance(value.get(key), int | str):
            return str(value[key])
    return None


def _label_order(label: str) -> tuple[bool, int, str]:
    number = label.isdecimal()
    return (not number, int(label) if number else 0, label)


def _class_keys(labels: list[str], folder: Path | ObjectPath) -> tuple[str, ...]:
    ordered = sorted(labels, key=_label_order)
    if all(label.isdecimal() for label in ordered):
        for name in NAME_TABLES:
            if (folder / name).is_file() and not leads_out(folder / name, folder):
                table = read_table(folder / name)
                return tuple(table.get(label, label) for label in ordered)
    return tuple(ordered)
