"""Small files, written whole or not at all; and a full disk, named whoever meets it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d3pack.errors import D3MError, NoSpaceError, NotFoundError

FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 1 << 22


def write_text(path: Path, text: str) -> None:
    """Write beside the target, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def digest(path: Path | None) -> str | None:
    """SHA-256 of a file, or of a folder's files and their names; None where nothing is given."""
    if path is None:
        return None
    if not path.exists():
        raise NotFoundError(f"there is no {path}")
    whole = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                part = hashlib.sha256()
                while block := opened.read(_BLOCK):
                    part.update(block)
            # the name of a lone file says nothing
            name = str(file.relative_to(path).as_posix()) if path.is_dir() else ""
            whole.update(hashlib.sha256(name.encode()).digest() + part.digest())
    return whole.hexdigest()


def reserve(path: Path, start: int) -> None:
    """Take the room of a file that is all zeros behind `start`.

    On a full disk this is an error; writing through a map would kill the process instead.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not every system and file system has it
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            file.seek(start)
            for at in range(start, size, _BLOCK):
                file.write(bytes(min(_BLOCK, size - at)))


@contextmanager
def plain_errors() -> Iterator[None]:
    """A full disk as an OSError with its number, which some libraries give only in words."""
    try:
        yield
    except D3MError:
        raise
    # safetensors and tokenizers have types of their own; numpy and shutil leave the number out
    except Exception as error:
        text = str(error)
        for code in FULL:
            if os.strerror(code) in text and getattr(error, "errno", None) != code:
                raise OSError(code, os.strerror(code)) from error
        if isinstance(error, OSError) and error.errno is None and "requested and" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error  # numpy's words
        raise


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk as one line that says how to go on."""
    try:
        with plain_errors():
            yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpaceError(
                "no space left on the disk",
                hint="free some and run the same command: it goes on where it stopped",
            ) from error
        raise
