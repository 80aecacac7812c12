"""A disk that is full, then has a little more room, then more.

The disk is a small tmpfs, which needs the right to mount; elsewhere tests that use it are skipped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d3pack.errors import NoSpaceError

FIRST, GROWTH = 8 << 10, 1.3  # bytes of the disk, and how it grows


class Disk:
    """A tmpfs whose size can change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("size=64k")

    def _mount(self, options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted")

    def resize(self, nbytes: int) -> None:
        """Give the disk so many bytes; what is on it stays."""
        self._mount(f"remount,size={nbytes}")

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def grow_until(self, done: Callable[[], BaseException | None]) -> int:
        """Fill the disk, then give it room until a call has enough; return how often it had not.

        Args:
            done: does the work; returns its error, which must be of the full disk, or None.
        """
        size, refused = FIRST, 0
        self.resize(size)
        (self.path / ".full").write_bytes(bytes(size))
        while (error := done()) is not None:
            assert isinstance(error, NoSpaceError), repr(error)
            refused += 1
            size = int(size * GROWTH)
            assert size < 1 << 28, "it never fits"
            self.resize(size)
        return refused


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mounted = Disk(tmp_path / "disk")
    yield mounted
    mounted.close()
