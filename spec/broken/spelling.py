"""Valid content in another spelling."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from draft import Draft, canonical

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    """Valid content in another spelling."""
    source = "provenance"

    def text(change: Callable[[str], str]) -> Edit:
        def edit(draft: Draft) -> None:
            before = canonical(draft.manifest)
            draft.text = change(before)
            assert draft.text != before

        return edit

    def header(change: Callable[[str], str]) -> Edit:
        def edit(draft: Draft) -> None:
            draft.reheader = change

        return edit

    def put(**changes: Any) -> Edit:
        return lambda draft: draft.__dict__.update(changes)

    def swapped(value: str) -> str:
        first, rest = value.split(',"shared":', 1)
        one, two = rest.split(',"rows":', 1)
        return f'{first},"rows":{two[:-1]},"shared":{one}}}'

    def flat(value: str) -> str:
        return re.sub(r'"shape":\[(\d+),(\d+)\]', r'"shape":[\1\2]', value)

    canon = "E_CANON"
    yield (
        "manifest-space",
        canon,
        "a space after a colon",
        source,
        text(lambda t: t.replace(":", ": ", 1)),
    )
    yield (
        "manifest-unsorted",
        canon,
        "keys not sorted",
        source,
        text(lambda t: "{" + t[t.index('"d3m"') : -1] + "," + t[1 : t.index(',"d3m"')] + "}"),
    )
    yield (
        "manifest-duplicate-key",
        canon,
        "a key twice",
        source,
        text(lambda t: t.replace('"classes":4', '"classes":5,"classes":4', 1)),
    )
    yield (
        "manifest-real-spelling",
        canon,
        "1.50 for 1.5",
        source,
        text(lambda t: t.replace("1.5,", "1.50,", 1)),
    )
    yield (
        "manifest-exponent",
        canon,
        "1E-07 for 1e-07",
        source,
        text(lambda t: t.replace("1e-07", "1E-07", 1)),
    )
    yield (
        "manifest-escape-case",
        canon,
        "\\u00E9 for \\u00e9",
        source,
        text(lambda t: t.replace("\\u00e9", "\\u00E9", 1)),
    )
    yield (
        "manifest-needless-escape",
        canon,
        "\\u0061 for a",
        source,
        text(lambda t: t.replace("resnet", "r\\u0065snet", 1)),
    )
    yield (
        "manifest-slash",
        canon,
        "\\/ for /",
        source,
        text(lambda t: t.replace("a/b", "a\\/b", 1)),
    )
    yield (
        "manifest-minus-zero",
        canon,
        "-0 for 0",
        source,
        text(lambda t: t.replace('"d3m":[1,0]', '"d3m":[1,-0]', 1)),
    )
    yield (
        "manifest-newline",
        canon,
        "a line end after the manifest",
        source,
        text(lambda t: t + "\n"),
    )
    yield (
        "header-space",
        canon,
        "a space in the header",
        source,
        header(lambda t: t.replace(":", ": ", 1)),
    )
    yield (
        "header-duplicate-tensor",
        canon,
        "a tensor twice",
        source,
        header(lambda t: t[:-1] + ',"rows":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'),
    )
    yield (
        "header-hidden-tensor",
        canon,
        "a tensor that the manifest does not know",
        source,
        header(lambda t: t[:-1] + ',"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'),
    )
    yield (
        "header-unknown-field",
        canon,
        "a field beside dtype, shape, data_offsets",
        source,
        header(lambda t: t.replace('"dtype":"U8",', '"dtype":"U8","note":1,', 1)),
    )
    yield (
        "header-overlap",
        canon,
        "tensors that overlap",
        source,
        header(lambda t: re.sub(r'"data_offsets":\[[1-9]\d*,', '"data_offsets":[0,', t)),
    )
    yield (
        "header-hole",
        canon,
        "bytes that no tensor owns",
        source,
        header(lambda t: t[: t.index(',"shared"')] + t[t.index(',"rows"') :]),
    )
    yield (
        "header-other-dtype",
        canon,
        "a dtype other than U8",
        source,
        header(lambda t: t.replace('"dtype":"U8"', '"dtype":"I8"', 1)),
    )
    yield "header-order", canon, "tensors listed in another order", source, header(swapped)
    yield "header-shape", canon, "a shape of one dimension", source, header(flat)
    yield "header-wide", canon, "8 spaces too many", source, put(width=8)
    yield "header-narrow", canon, "not padded to 8", source, put(width=-8)
    yield "header-tabs", canon, "padded with tabs", source, put(space="\t")
    yield "header-empty-key", canon, "an empty name", source, header(lambda t: t[:-1] + ',"":1}')
    bad = "E_JSON"
    yield "manifest-nan", bad, "NaN", source, text(lambda t: t.replace("0.93125", "NaN", 1))
    yield (
        "manifest-infinity",
        bad,
        "-Infinity",
        source,
        text(lambda t: t.replace("0.93125", "-Infinity", 1)),
    )
    yield (
        "manifest-1e999",
        bad,
        "a real beyond binary64",
        source,
        text(lambda t: t.replace("0.93125", "1e999", 1)),
    )
    yield (
        "manifest-digits",
        bad,
        "5000 digits",
        source,
        text(lambda t: t.replace("44700000", "9" * 5000, 1)),
    )
    yield (
        "manifest-big-integer",
        bad,
        "2**53",
        source,
        text(lambda t: t.replace("44700000", str(2**53), 1)),
    )
    yield (
        "manifest-nested",
        bad,
        "40 levels",
        source,
        text(lambda t: t.replace("0.93125", "[" * 40 + "]" * 40, 1)),
    )
    yield (
        "manifest-nested-deep",
        bad,
        "100,000 levels",
        source,
        text(lambda t: t.replace("0.93125", "[" * 100_000 + "]" * 100_000, 1)),
    )
    yield (
        "manifest-surrogate",
        bad,
        "half of a surrogate pair",
        source,
        text(lambda t: t.replace("\\ud83d\\udc08", "\\ud83d", 1)),
    )
    yield "manifest-cut", bad, "JSON that ends early", source, text(lambda t: t[:-1])
    yield (
        "manifest-control",
        bad,
        "a raw control character in a string",
        source,
        text(lambda t: t.replace("resnet", "res\x01net", 1)),
    )
    yield (
        "manifest-not-ascii",
        bad,
        "a raw character above 127",
        source,
        text(lambda t: t.replace("resnet", "r\u00e9snet", 1)),
    )
    yield "manifest-bom", bad, "a byte order mark", source, text(lambda t: "\ufeff" + t)
    yield "manifest-empty", bad, "no manifest", source, text(lambda t: "")
