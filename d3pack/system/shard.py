"""Shares of a run: several processes do the units of one run, and find each other's results.

A unit of work (a class, a group of rows, a file) is the same whatever the number of shards, so the
result is too: a shard only decides which process does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from d3pack.errors import D3MError, UsageError

MOST_SHARDS = 99_999


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shares of a run; the default is the whole run.

    Example:
        >>> Shard.parse("3/8").owns(10)
        True
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST_SHARDS:
            raise UsageError(
                f"invalid shard '{self}': expected NUMBER/COUNT, as 3/8, of at most {MOST_SHARDS:,}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/8": the third of eight.

        Raises:
            UsageError: if it is not a share.
        """
        match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        if match is None:
            raise UsageError(f"invalid shard {text!r}: expected NUMBER/COUNT, as 3/8")
        return cls(int(match[1]), int(match[2]))

    def owns(self, unit: int) -> bool:
        """Return whether a unit of work, by its number, is done by this shard."""
        return unit % self.count == self.number - 1

    def share(self, units: int) -> range:
        """Return the numbers of those of so many units of work that this shard does."""
        return range(self.number - 1, units, self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class WaitingError(D3MError):
    """A shard has done what it can, and needs results of others."""

    code = "E_WAITING"
    exit_code = 8


class BusyError(UsageError):
    """Another process does the same share of a run, or has not ended yet."""
