"""One class out of a file that is elsewhere: planned, read, verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from format_packs import VALID, VECTORS

import d3pack
from d3pack.errors import InvalidPackError, UsageError
from d3pack.format import class_ranges, read_class_ranges, read_header
from d3pack.testing import raises_code


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_ranges_give_the_pack_of_select(path: Path) -> None:
    data = path.read_bytes()
    pack = d3pack.read(data)
    head = read_header(data[: head_size(data)])
    assert (head.root, head.size, head.classes) == (pack.root, len(data), len(pack.classes))
    last = head.classes - 1
    for rows in [[0], [head.classes // 2], [last], [last, 0][: head.classes]]:
        reads = class_ranges(head, rows)
        part = read_class_ranges(head, rows, [data[r.start : r.stop] for r in reads])
        if rows != list(range(head.classes)):
            assert part == replace(pack.select(rows), probes=None)
        new = list(range(len(rows)))
        assert [a.tolist() for a in part.counters(new, [0] * len(rows))] == [
            a.tolist() for a in pack.counters(rows, [0] * len(rows))
        ]
        assert d3pack.read(d3pack.pack_bytes(part)) == part


def head_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_changed_byte_in_any_range_is_refused() -> None:
    data = (VECTORS / "valid" / "everything.d3m").read_bytes()
    head = read_header(data)
    reads = class_ranges(head, [2, 0])
    good = [data[r.start : r.stop] for r in reads]
    for place, blob in enumerate(good):
        bad = [*good[:place], bytes([blob[0] ^ 1]) + blob[1:], *good[place + 1 :]]
        with pytest.raises(
            InvalidPackError, check=lambda error: error.code in {"E_HASH", "E_LEAF"}
        ):
            read_class_ranges(head, [2, 0], bad)
        with raises_code("E_TRUNCATED"):
            read_class_ranges(head, [2, 0], [*good[:place], blob[:-1], *good[place + 1 :]])
    with raises_code("E_LEAF", match="class 1 "):
        read_class_ranges(head, [2, 1], good)
    with pytest.raises(UsageError):
        class_ranges(head, [0, 4])


def test_ranges_of_one_class_are_a_small_part_of_the_file() -> None:
    data = (VECTORS / "valid" / "classes-300.d3m").read_bytes()
    head = read_header(data)
    reads = class_ranges(head, [150])
    assert reads[-1].stop - reads[-1].start == head.placement.row == 4 + 2
    assert [r.start for r in reads[:-1]] == [head.data, reads[0].stop], "names, then leaves"
    with raises_code("E_TRUNCATED"):
        read_header(data[:100])


def test_part_with_repeated_ids_is_refused() -> None:
    data = (VECTORS / "invalid" / "ids-twice.d3m").read_bytes()
    head = read_header(data)
    rows = list(range(head.classes))[::-1]
    blobs = [data[r.start : r.stop] for r in class_ranges(head, rows)]
    with raises_code("E_IDS", match="same id"):
        read_class_ranges(head, rows, blobs)
