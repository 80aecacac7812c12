"""The folder of an export: what it holds, and who writes into it.

A mark says what decides about the files. One process without a shard holds its lock alone; shards
share it, and each holds a lock file of its own. All of these names begin with `.d3pack-`, which
other tools do not read. Object stores have no locks: two exports with one mark write equal
objects, so they only waste work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from d3pack.errors import D3MError, NoSpaceError, UsageError
from d3pack.system import (
    BusyError,
    ObjectPath,
    Shard,
    create_file,
    disk_full_as_error,
    exclusive,
    lock,
    remove_leftovers,
    replace_file,
    size,
)

_OURS = ".d3pack-"
MARK = f"{_OURS}export.json"
CLASSES = ".classes.json"  # of a tree: hidden, or readers take it for a table
_LEAST = 100  # bytes that an image of one colour takes at least


def check_new(output: Path | ObjectPath, images: int) -> None:
    """Refuse a new export that the disk cannot hold, before anything is written."""
    if isinstance(output, Path) and not os.path.exists(output / MARK):
        check_space(output, images)


def check_space(output: Path | ObjectPath, images: int) -> None:
    """Refuse so many images where the disk cannot hold even the smallest.

    Raises:
        NoSpaceError: it cannot.
    """
    if isinstance(output, ObjectPath):
        return
    # unlike Path.exists, no error where a name is too long
    existing = next(filter(os.path.exists, (output, *output.absolute().parents)))
    free = shutil.disk_usage(existing).free
    if free < images * _LEAST:
        raise NoSpaceError(
            f"{images:,} images take {size(images * _LEAST)} at least, and the disk of {output} has"
            f" {size(free)} free",
            hint="take fewer classes or images of each, or another disk",
        )


@contextmanager
def claimed(output: Path | ObjectPath, mark: Mapping[str, Any], shard: Shard) -> Iterator[None]:
    """Lock a folder that is empty or has the same mark, for one export or one of each shard.

    What killed processes left is removed where nobody else can be writing: without a shard.
    """
    if isinstance(output, ObjectPath):
        used = output.exists()  # in this order: another export may have just begun
        if not (output / MARK).exists():
            _refuse_used(output, used)
            replace_file(output / MARK, to_json(mark))
        _compare(output, (output / MARK).read_bytes(), mark)
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{output} is not a folder", hint="choose another output") from None
    except OSError as error:
        raise D3MError(f"cannot make the folder {output}: {error.strerror}") from None
    try:
        with disk_full_as_error(f"to write into {output}"):
            path = output / MARK
            used = any(not entry.name.startswith(_OURS) for entry in output.iterdir())
            if not path.exists():  # in this order: another shard may have just begun
                _refuse_used(output, used)
            create_file(path, to_json(mark))
            with _locked(path, mark, shard):
                yield
    except BrokenPipeError:  # of a progress that nobody reads any more
        raise
    except OSError as error:
        raise D3MError(
            f"cannot write into {output}: {error.strerror or error}",
            hint="finished files are kept: the same call goes on",
        ) from error


@contextmanager
def _locked(path: Path, mark: Mapping[str, Any], shard: Shard) -> Iterator[None]:
    output, alone = path.parent, shard.count == 1
    with ExitStack() as held:
        with _refusing(f"another export is writing into {output}"):
            whole = held.enter_context(lock(path, shared=not alone))
        _check(path, mark)
        if not alone:
            with _refusing(f"another process is writing shard {shard} into {output}"):
                name = f"{_OURS}shard-{shard.number}-of-{shard.count}.lock"
                held.enter_context(exclusive(output / name))
        elif whole.held:
            remove_leftovers(output)
            for left in output.glob(f"{_OURS}shard-*.lock"):
                left.unlink(missing_ok=True)
        yield


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise BusyError(message, hint="wait for it, or choose another folder") from None


def _check(path: Path, mark: Mapping[str, Any]) -> None:
    """Compare the mark of an export with the one that is there."""
    content = path.read_bytes()
    if not content:  # its creator was killed
        path.write_bytes(to_json(mark))  # in place: the file is locked
        return
    _compare(path.parent, content, mark)


def _refuse_used(output: Path | ObjectPath, used: bool) -> None:
    if used:
        raise UsageError(f"{output} is not empty", hint="choose an empty folder")


def _compare(output: Path | ObjectPath, content: bytes, mark: Mapping[str, Any]) -> None:
    try:
        is_same = json.loads(content) == mark
    except ValueError:
        is_same = False
    if not is_same:
        raise UsageError(f"{output} holds another export", hint="choose an empty folder")


def to_json(value: Any) -> bytes:
    """Return a value as an indented JSON document."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
