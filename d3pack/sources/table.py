"""Parquet files and Hub datasets, through the `datasets` library (memory-mapped Arrow)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d3pack.errors import HubError, NotFoundError, SourceError
from d3pack.sources.base import Skip, edge_stamp
from d3pack.sources.images import MAX_BYTES, BadImageError
from d3pack.sources.links import bounds, refuse_links
from d3pack.sources.objects import walk
from d3pack.sources.splits import below, is_hidden, pick_files
from d3pack.system import ObjectPath, first_line, require

LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "y")
IMAGES = ("image", "img", "pixel_values", "picture")
ADDRESS = "hf://datasets/"
_DEPTH = 8  # of folders of parquet files in an object store


def _library() -> Any:
    datasets = require("datasets", "a parquet or Hub source")
    datasets.disable_progress_bars()
    return datasets


def open_parquet(path: Path | ObjectPath, split: str = "train") -> TableStore:
    """Open one parquet file, or those of a directory (of `split`, if their names have splits).

    Files of an object store are copied once into the cache of `datasets`.
    """
    datasets = _library()
    files = [path]
    if path.is_dir():
        below_it = walk(path, _DEPTH) if isinstance(path, ObjectPath) else path.rglob("*.parquet")
        files = sorted((file for file in below_it if file.suffix == ".parquet"), key=str)
        files = [f for f in files if not any(map(is_hidden, below(f, path).parts))]
        files = pick_files(files, path, split)
        refuse_links("file", files, path)
    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    # pyarrow and datasets raise many types for a damaged file
    except Exception as error:
        raise SourceError(f"{path.name} is not readable parquet: {first_line(error)}") from error
    return TableStore(table, "parquet", [path if path.is_dir() else path.parent])


def open_hub(address: str, split: str = "train") -> TableStore:
    """Open `hf://datasets/org/name[@revision]`; the dataset's features have the label names."""
    repo, _, revision = address.removeprefix(ADDRESS).partition("@")
    if repo.count("/") > 1 or not repo:
        raise SourceError(f"invalid address {address!r}: expected {ADDRESS}org/name[@revision]")
    datasets = _library()
    try:
        table = datasets.load_dataset(repo, split=split, revision=revision or None)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise NotFoundError(
            f"there is no dataset {repo} on the Hub: {first_line(error)}"
        ) from error
    # of the network, the Hub, or the layout of the dataset
    except Exception as error:
        raise HubError(
            f"cannot load {repo}: {first_line(error)}",
            hint="check the name, the split and the network",
        ) from error
    from huggingface_hub import constants

    caches = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    return TableStore(table, "hub", [Path(cache) for cache in caches])


def _known(values: Sequence[Any], named: bool) -> npt.NDArray[np.bool_]:
    """Return which rows have a label; where labels have names, the Hub writes -1 for none."""
    known = [
        value is not None and value == value and not (named and value < 0)  # NaN is not itself
        for value in values
    ]
    return np.asarray(known, dtype=np.bool_)


class TableStore:
    """Rows with a column of images and one of labels; only row numbers are kept in memory.

    A row may name a file in the place of bytes. It is read below one of the folders only: a table
    of somebody else must not choose among all files of this machine.
    """

    def __init__(self, table: Any, kind: str, folders: Sequence[Path | ObjectPath]) -> None:
        datasets = _library()
        self.kind = kind
        self._folders = [bounds(f) for f in folders if isinstance(f, Path)]
        features = table.features
        images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
        images += [n for n in IMAGES if n in features and n not in images]
        labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
        labels += [n for n in LABELS if n in features and n not in labels]
        if not images or not labels:
            raise SourceError(
                f"no {'label' if images else 'image'} column among {', '.join(list(features)[:9])}",
                hint="name the columns image and label",
            )
        self._image, label = images[0], labels[0]
        if isinstance(features[self._image], datasets.Image):
            table = table.cast_column(self._image, datasets.Image(decode=False))
        self._table = table.with_format(None)
        named = isinstance(features[label], datasets.ClassLabel)
        if not named and not isinstance(features[label], datasets.Value):
            raise SourceError(
                f"the column {label!r} does not hold one label for each image",
                hint="give a table with one number or one word in each row",
            )
        known = _known(self._table[label][:], named)
        self.refused = [
            Skip("", f"{row:09d}", "no label in its row") for row in np.flatnonzero(~known)
        ]
        places = np.flatnonzero(known)
        if self.refused:  # a missing label would turn integers into floats
            table = table.select(places)
        values = table.with_format("numpy")[label][:]
        if named:
            self.keys = tuple(features[label].names)
            codes = np.asarray(values, dtype=np.int64)
        else:
            distinct, codes = np.unique(np.asarray(values), return_inverse=True)
            self.keys = tuple(str(value) for value in distinct)
        order = np.argsort(codes, kind="stable")
        ends = np.searchsorted(codes[order], np.arange(len(self.keys) + 1))
        self._rows = [places[order[a:b]] for a, b in pairwise(ends)]
        self.counts = tuple(len(rows) for rows in self._rows)

    def names(self, c: int) -> Sequence[str]:
        return [f"{row:09d}" for row in self._rows[c]]

    def read(self, c: int, i: int) -> bytes:
        value = self._table[int(self._rows[c][i])][self._image]
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            value = self._file(str(path)) if data is None and path else data
        if not isinstance(value, bytes):
            raise BadImageError("the row holds no image bytes")
        return value

    def _file(self, path: str) -> bytes:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise BadImageError("the row names a file that lies outside of the dataset")
        if not real.is_file():
            raise BadImageError("the row names a file that is not there, or no regular file")
        with real.open("rb") as file:
            return file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES + 1))

    def stamp(self, c: int, i: int) -> bytes:
        try:
            data = self.read(c, i)
        except BadImageError:
            return hashlib.sha256(b"none").digest()
        return edge_stamp(len(data), lambda at, length: data[at : at + length])
