"""The part of a source that is meant, however folders or files spell train, val and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from d3pack.errors import SourceError
from d3pack.system import ObjectPath

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "dev": "dev",
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?:set|data)?(?![a-z])")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to a program and not to the images."""
    return name.startswith(".") or name == "__MACOSX"


def pick_folder(names: Iterable[str], split: str) -> str | None:
    """Return the folder of a split, or None if the folders are classes.

    A class may be called "train": folders are splits only if all of them are named like one.

    Raises:
        SourceError: they are splits, but none is the one that is meant.
    """
    names = sorted(names)
    if not names or not all(name.casefold() in SPLITS for name in names):
        return None
    if split in names:
        return split
    matching = [name for name in names if SPLITS[name.casefold()] == _normal(split)]
    if not matching:
        raise _missing(split, names)
    return matching[0]


def pick_files(
    paths: Sequence[Path | ObjectPath], root: Path | ObjectPath, split: str
) -> list[Path | ObjectPath]:
    """Return the files of a split, or all of them if no name contains a split.

    Raises:
        SourceError: there are splits, but not the one that is meant.
    """
    splits = [_split_of(below(path, root)) for path in paths]
    special = split.casefold() not in SPLITS  # a split of this dataset only, such as "extra"
    matching = [
        path
        for path, part in zip(paths, splits, strict=True)
        if (path.name.startswith(split) if special or part is None else part == _normal(split))
    ]
    if not matching and any(splits):
        raise _missing(split, sorted({part for part in splits if part}))
    return matching or list(paths)


def below(path: Path | ObjectPath, root: Path | ObjectPath) -> PurePath:
    """Return the part of a path below another."""
    return PurePath(str(path)).relative_to(str(root))


def _normal(split: str) -> str:
    return SPLITS.get(split.casefold(), split)


def _split_of(path: PurePath) -> str | None:
    """Return the split in the name of a file, or else in that of the nearest folder."""
    for part in reversed(path.parts):
        if word := _WORD.search(part.casefold()):
            return SPLITS[word[1]]
    return None


def _missing(split: str, names: Sequence[str]) -> SourceError:
    return SourceError(
        f"no split {split!r}; there are {', '.join(names)}",
        hint="choose one of these, or give only that part as the source",
    )
