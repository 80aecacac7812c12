"""Shares of a run."""

from __future__ import annotations

import pytest

from d3pack.errors import UsageError
from d3pack.system import Shard


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_unit_belongs_to_one_shard(count: int) -> None:
    shards = [Shard(number, count) for number in range(1, count + 1)]

    for unit in range(20):
        assert sum(shard.owns(unit) for shard in shards) == 1


def test_shard_is_read_as_it_is_written() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert str(Shard.parse("03/8")) == "3/8"


@pytest.mark.parametrize(
    "text", ["", "3", "0/8", "9/8", "1/0", "-1/8", "1/8/8", "a/b", "1/123456", " 1/2", "1/٢"]
)
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected NUMBER/COUNT, as 3/8"):
        Shard.parse(text)
