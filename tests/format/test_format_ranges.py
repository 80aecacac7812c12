"""One class out of a file that is elsewhere: planned, read, verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from format_packs import VALID, VECTORS

import d3pack
from d3pack.errors import HashError, LeafError, TruncatedError, UsageError
from d3pack.format import plan_class_reads, read_header, verify_class


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_one_class_is_what_select_gives(path: Path) -> None:
    data = path.read_bytes()
    pack = d3pack.read(data)
    head = read_header(data[: head_size(data)])
    assert (head.root, head.size, head.classes) == (pack.root, len(data), len(pack.classes))
    for index in {0, head.classes // 2, head.classes - 1}:
        reads = plan_class_reads(head, index)
        assert [read.start for read in reads] == sorted(read.start for read in reads)
        one = verify_class(head, index, {r.name: data[r.start : r.stop] for r in reads})
        want = pack.select([index]) if head.classes > 1 else pack
        if head.classes > 1:
            assert one == replace(want, probes=None)
        assert one.counters([0], [0]) == pack.counters([index], [0])
        assert d3pack.read(d3pack.pack_bytes(one)) == one


def head_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_wrong_byte_in_any_range_is_found() -> None:
    data = (VECTORS / "valid" / "everything.d3m").read_bytes()
    head = read_header(data)
    reads = plan_class_reads(head, 2)
    good = {r.name: data[r.start : r.stop] for r in reads}
    for name, blob in good.items():
        bad = {**good, name: bytes([blob[0] ^ 1]) + blob[1:]}
        with pytest.raises((HashError, LeafError)):
            verify_class(head, 2, bad)
        with pytest.raises(TruncatedError):
            verify_class(head, 2, {**good, name: blob[:-1]})
    with pytest.raises(LeafError):
        verify_class(
            head,
            1,
            {
                **good,
            },
        )
    with pytest.raises(UsageError):
        plan_class_reads(head, 4)


def test_reading_a_class_takes_little_of_a_large_file() -> None:
    data = (VECTORS / "valid" / "classes-300.d3m").read_bytes()
    head = read_header(data)
    reads = plan_class_reads(head, 150)
    rows = sum(r.stop - r.start for r in reads if r.name not in ("classes.text", "leaves.hash"))
    assert rows == 4 + 2
    with pytest.raises(TruncatedError):
        read_header(data[:100])
