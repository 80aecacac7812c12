"""Which part of a source is meant, however its folders or files spell train, val and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from d3pack.errors import SourceError

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


def hidden(name: str) -> bool:
    """Whether a file or folder is some program's own, not the person's."""
    return name.startswith(".") or name == "__MACOSX"


def pick_folder(names: Iterable[str], split: str) -> str | None:
    """The folder of `split`; None where the folders are classes.

    "train" is also a vehicle: folders are splits only where all of them are named like one.
    """
    names = sorted(names)
    if not names or not all(name.casefold() in SPLITS for name in names):
        return None
    if split in names:
        return split
    found = [name for name in names if SPLITS[name.casefold()] == _plain(split)]
    if not found:
        raise _missing(split, names)
    return found[0]


def pick_files(paths: Sequence[Path], root: Path, split: str) -> list[Path]:
    """The files of `split`; all of them only where no name tells of a split."""
    told = [_told(path.relative_to(root)) for path in paths]
    own = split.casefold() not in SPLITS  # a name that only this data set knows: "extra"
    found = [
        path
        for path, part in zip(paths, told, strict=True)
        if (path.name.startswith(split) if own or part is None else part == _plain(split))
    ]
    if not found and any(told):
        raise _missing(split, sorted({part for part in told if part}))
    return found or list(paths)


def _plain(split: str) -> str:
    return SPLITS.get(split.casefold(), split)


def _told(path: Path) -> str | None:
    """The split that a file's name tells, or else the nearest folder's."""
    for part in reversed(path.parts):
        if word := _WORD.search(part.casefold()):
            return SPLITS[word[1]]
    return None


def _missing(split: str, names: Sequence[str]) -> SourceError:
    return SourceError(
        f"no split {split!r}; there are {', '.join(names)}",
        hint="choose one with --split, or give that part alone as the source",
    )
