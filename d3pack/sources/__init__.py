"""Real images with class names: from folders, archives, shards, parquet, the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources.archive import TAR_SUFFIXES, TarStore, ZipStore
from d3pack.sources.base import OnError, Skip, Source, Store, random_order
from d3pack.sources.folder import FolderStore, holds_classes
from d3pack.sources.images import BadImageError
from d3pack.sources.names import neighbour_table, read_table, tidy
from d3pack.sources.objects import ObjectTree, holds_object_classes
from d3pack.sources.shards import ShardStore, expand, looks_like_shards
from d3pack.sources.splits import pick_files
from d3pack.sources.table import ADDRESS, open_hub, open_parquet
from d3pack.system import ObjectPath, place

__all__ = [
    "BadImageError",
    "Skip",
    "Source",
    "Store",
    "open_source",
    "random_order",
    "read_table",
    "tidy",
]


def open_source(
    address: str | Path,
    *,
    class_names: str | Path | Mapping[str, str] | None = None,
    split: str = "train",
    on_error: OnError = "skip",
    first: int | None = None,
) -> Source:
    """Open real images.

    Args:
        address: a directory with a folder for each class, a tar or zip of one, WebDataset shards,
            a parquet file or a directory of them, each a path or an address such as
            `s3://bucket/photos`; or `hf://datasets/org/name[@revision]`.
        class_names: names by class key (name of the folder, WordNet id, label), or a file of them.
            None: `.classes.json` or `classes.json` in the directory, a table that lies beside
            folders of WordNet ids, else the keys.
        split: the part to use, where the source has several.
        on_error: "skip" to leave bad images out and record them, "fail" to raise.
        first: use only so many classes, for a trial.

    Raises:
        NotFoundError: there is no such file, directory or dataset.
        SourceError: it is not a source of at least two classes with images.
        HubError: the dataset cannot be loaded from the Hub.
        StorageError: the object store cannot be reached, or refuses.

    Example:
        >>> from d3pack.sources import open_source
        >>> source = open_source("photos/")  # doctest: +SKIP
        >>> source.classes, source.counts  # doctest: +SKIP
        (('cat', 'dog'), (120, 118))
    """
    path = place(address)
    store = _store(str(address), path, split)
    if isinstance(class_names, str | Path):
        table: Mapping[str, str] | None = read_table(Path(class_names))
    elif class_names is None and store.kind in {"folder", "tar", "zip"}:
        table = neighbour_table(store.keys, path, path.parent)
    else:
        table = class_names
    opened_by = {
        "address": str(path.absolute() if isinstance(path, Path) and path.exists() else address),
        "class_names": str(class_names) if isinstance(class_names, Path) else class_names,
        "split": split,
        "on_error": on_error,
        "first": first,
    }
    return Source(store, table=table, on_error=on_error, first=first, opened_by=opened_by)


def _store(address: str, path: Path | ObjectPath, split: str) -> Store:
    if address.startswith(ADDRESS):
        return open_hub(address, split)
    if "{" in address and not path.exists():
        return ShardStore(expand(address))
    if path.is_dir():
        suffixes = {entry.suffix.lower() for entry in path.iterdir() if entry.is_file()}
        if holds_object_classes(path) if isinstance(path, ObjectPath) else holds_classes(path):
            return _tree(path, split)
        if suffixes & TAR_SUFFIXES:
            return ShardStore(pick_files(expand(address), path, split))
        data = path / "data"
        below = data.iterdir() if data.is_dir() else ()
        if ".parquet" in suffixes or any(entry.suffix == ".parquet" for entry in below):
            return open_parquet(path, split)
        return _tree(path, split)
    if not path.is_file():
        raise NotFoundError(
            f"there is no source {path.name}", hint="give a folder, archive or hf://datasets/..."
        )
    suffix = path.suffix.lower()
    if suffix in TAR_SUFFIXES:
        return ShardStore([path]) if looks_like_shards(path) else TarStore(path, split)
    if suffix == ".zip":
        return ZipStore(path, split)
    if suffix == ".parquet":
        return open_parquet(path, split)
    raise SourceError(
        f"{path.name} is not a source that d3pack reads",
        hint="give a folder of class folders, .tar, .zip, WebDataset shards, .parquet or"
        " hf://datasets/...",
    )


def _tree(path: Path | ObjectPath, split: str) -> Store:
    return FolderStore(path, split) if isinstance(path, Path) else ObjectTree(path, split)
