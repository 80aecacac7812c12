"""Values without a meaning, and hashes that do not match."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    def poke(name: str, at: int, value: bytes) -> Edit:
        return lambda draft: draft.poke(name, at, value).seal() and None

    def names(text: bytes) -> Edit:
        def edit(draft: Draft) -> None:
            draft.blobs["classes.text"] = text
            draft.params("classes")["bytes"] = len(text)
            draft.seal()

        return edit

    def flip(name: str) -> Edit:
        def edit(draft: Draft) -> None:
            old = draft.blobs[name]
            draft.blobs[name] = bytes([old[0] ^ 1]) + old[1:]

        return edit

    def leaves(change: Callable[[bytes], bytes]) -> Edit:
        def edit(draft: Draft) -> None:
            draft.blobs["leaves.hash"] = change(draft.blobs["leaves.hash"])
            draft.rehash().reroot()

        return edit

    def first_label(fields: list[tuple[int, int]]) -> Edit:
        """Overwrite the first record: pairs of value and width, least significant bit first."""

        def edit(draft: Draft) -> None:
            blob = draft.blobs["labels.bits"]
            value, at = int.from_bytes(blob, "little"), 0
            for field, width in fields:
                value = value & ~(((1 << width) - 1) << at) | field << at
                at += width
            draft.blobs["labels.bits"] = value.to_bytes(len(blob), "little")
            draft.seal()

        return edit

    def spare(draft: Draft) -> None:
        row = len(draft.blobs["labels.bits"]) // draft.manifest["classes"]
        draft.poke(
            "labels.bits", row - 1, bytes([draft.blobs["labels.bits"][row - 1] | 0x80])
        ).seal()

    f16, topk, dense, full = "prompts-f16", "labels-topk", "labels-dense", "everything"
    for name, code in (
        ("classes.text", "E_HASH"),
        ("leaves.hash", "E_HASH"),
        ("prompts.codebook", "E_HASH"),
        ("adapter.scales", "E_HASH"),
        ("probes.indices", "E_HASH"),
        ("prompts.codes", "E_LEAF"),
        ("picks.codes", "E_LEAF"),
        ("labels.bits", "E_LEAF"),
    ):
        case = f"{'hash' if code == 'E_HASH' else 'leaf'}-{name.split('.')[0]}"
        case += "-codebook" if name.endswith("codebook") else ""
        yield case, code, f"a bit of {name} flipped", full, flip(name)
    for name, code in (("shared", "E_HASH"), ("rows", "E_LEAF")):
        case, breaks = f"newer-{name}-flipped", f"a bit of {name} flipped"
        yield case, code, breaks, "newer-minor", flip(f"captions.{name}")
    yield (
        "leaf-wrong",
        "E_LEAF",
        "a leaf with a bit flipped",
        full,
        leaves(lambda b: bytes([b[0] ^ 1]) + b[1:]),
    )
    yield (
        "leaf-swapped",
        "E_LEAF",
        "the leaves of two classes swapped",
        full,
        leaves(lambda b: b[16:32] + b[:16] + b[32:]),
    )
    yield "leaf-zero", "E_LEAF", "leaves of zeros", full, leaves(lambda b: bytes(len(b)))
    bad, four = "E_NAME", "prompts-i8"
    for name, breaks, text in (
        ("empty", "an empty name", b"a\n\nc\nd"),
        ("twice", "the same name twice", b"a\nb\nc\na"),
        ("few", "three names for four classes", b"a\nb\nc"),
        ("many", "a line end after the last name", b"a\nb\nc\nd\n"),
        ("nul", "a NUL", b"a\0\nb\nc\nd"),
        ("ansi", "a terminal escape", b"a\nb\x1b[31m\nc\nd"),
        ("carriage-return", "a carriage return", b"a\r\nb\nc\nd"),
        ("delete", "U+007F", b"a\x7f\nb\nc\nd"),
        ("c1", "U+0085", b"a\xc2\x85\nb\nc\nd"),
        ("separator", "U+2028", b"a\xe2\x80\xa8\nb\nc\nd"),
        ("bidi", "U+202E turns the text around", b"a\xe2\x80\xaeb\nb\nc\nd"),
        ("bom", "U+FEFF", b"\xef\xbb\xbfa\nb\nc\nd"),
        ("not-utf8", "a byte that is not UTF-8", b"a\xff\nb\nc\nd"),
        ("overlong", "an overlong form", b"a\xc0\xaf\nb\nc\nd"),
        ("surrogate", "an encoded surrogate", b"a\xed\xa0\x80\nb\nc\nd"),
        ("long", "1025 bytes", b"x" * 1025 + b"\nb\nc\nd"),
        ("long-unicode", "1026 bytes in 342 characters", "\u732b".encode() * 342 + b"\nb\nc\nd"),
    ):
        yield f"name-{name}", bad, breaks, four, names(text)
    yield (
        "ids-twice",
        "E_IDS",
        "two classes with one id",
        "selected",
        poke("ids.ids", 0, struct.pack("<2I", 3, 3)),
    )
    yield (
        "ids-needless",
        "E_IDS",
        "ids 0, 1",
        "selected",
        poke("ids.ids", 0, struct.pack("<2I", 0, 1)),
    )
    nan, inf = b"\x00\x7e", b"\x00\xfc"
    bad = "E_PROMPT"
    yield "prompt-nan", bad, "NaN", f16, poke("prompts.values", 70, nan)
    yield "prompt-inf", bad, "minus infinity", f16, poke("prompts.values", -2, inf)
    yield "prompt-i8-code", bad, "the code -128", "prompts-i8", poke("prompts.codes", 40, b"\x80")
    yield "prompt-i8-scale", bad, "a scale of NaN", "prompts-i8", poke("prompts.scales", 2, nan)
    yield "prompt-i4-scale", bad, "an infinite scale", "prompts-i4", poke("prompts.scales", 4, inf)
    yield (
        "prompt-i4-spare",
        bad,
        "a spare nibble that is not zero",
        "prompts-i4-odd",
        poke("prompts.codes", 16, b"\x1f"),
    )
    yield (
        "prompt-pq-code",
        bad,
        "a code beyond the codebook",
        "prompts-pq",
        poke("prompts.codes", 9, b"\x10"),
    )
    yield (
        "prompt-pq-codebook",
        bad,
        "NaN in the codebook",
        "prompts-pq",
        poke("prompts.codebook", 6, nan),
    )
    none = "outputs-unconditional"
    for name, breaks, at, value in (
        ("code", "the code -128", "unconditional.codes", b"\x80"),
        ("scale", "a scale of NaN", "unconditional.scales", nan),
    ):
        yield f"unconditional-{name}", bad, breaks, none, poke(at, 2, value)
    yield (
        "unconditional-nibble",
        bad,
        "a nibble beyond an odd width",
        "unconditional",
        poke("unconditional.codes", 16, b"\x1f"),
    )
    yield "hash-unconditional", "E_HASH", "a bit flipped", none, flip("unconditional.codes")
    yield "prompt-pq-scale", bad, "a scale of NaN", "prompts-pq", poke("prompts.scales", 0, nan)
    yield (
        "picks-twice",
        "E_PICKS",
        "a candidate twice",
        "picks",
        poke("picks.codes", 0, b"\x09\x09"),
    )
    yield (
        "picks-twice-lane",
        "E_PICKS",
        "a candidate twice in a lane",
        "picks-modes",
        poke("picks.codes", 0, b"\x00\x00"),
    )
    yield (
        "picks-spare",
        "E_PICKS",
        "a bit after the last pick",
        "picks-own",
        poke("picks.codes", 2, b"\x04"),
    )
    yield (
        "picks-sets-spare",
        "E_PICKS",
        "a bit after the set of a class",
        "picks-sets",
        poke("picks.codes", 0, b"\x0c"),
    )
    yield (
        "weights-one",
        "E_WEIGHTS",
        "all weights are 1",
        "weights",
        poke("weights.codes", 0, b"\x80" * 24),
    )
    yield (
        "codes-rank",
        "E_CODES",
        "a set of two of sixteen atoms that does not exist",
        "codes-mixed",
        poke("codes.bits", 0, b"\xff\x01"),
    )
    yield (
        "codes-spare",
        "E_CODES",
        "a bit after the last code",
        "codes-mixed",
        poke("codes.bits", 5, b"\x80"),
    )
    bad = "E_LABEL"
    two = [(0, 2), (1, 2), (9, 8), (9, 8)]
    yield "label-class-beyond", bad, "class 36 is 37", "labels-topk-bits", first_label([(37, 6)])
    yield "label-class-twice", bad, "a class twice", topk, first_label([(1, 2), (1, 2), *two[2:]])
    yield (
        "label-unsorted",
        bad,
        "equal ranks, classes descending",
        topk,
        first_label([(2, 2), (1, 2), (0, 8), (9, 8)]),
    )
    yield (
        "label-unsorted-rank",
        bad,
        "ranks descending",
        "labels-topk-all",
        first_label([(0, 2), (1, 2), (2, 2), (3, 2), (9, 5), (8, 5), (10, 5)]),
    )
    yield "label-tail-all", bad, "all mass in the tail", topk, first_label([*two[:3], (0, 8)])
    yield (
        "label-tail-some",
        bad,
        "a tail although k is all",
        "labels-topk-all",
        first_label([(0, 2), (1, 2), (2, 2), (3, 2), (8, 5), (9, 5), (10, 5), (9, 5)]),
    )
    yield "label-spare-bits", bad, "spare bits that are not zero", "labels-topk-bits", spare
    yield "label-nan", bad, "NaN", dense, poke("labels.probs", 8, nan)
    yield "label-negative", bad, "minus a half", dense, poke("labels.probs", 8, b"\x00\xb8")
    yield (
        "label-minus-zero",
        bad,
        "minus zero",
        dense,
        poke("labels.probs", 0, struct.pack("<4e", 1, -0.0, 0, 0)),
    )
    yield (
        "label-mass",
        bad,
        "a sum of 1.5",
        dense,
        poke("labels.probs", 0, struct.pack("<4e", 1, 0.5, 0, 0)),
    )
    yield (
        "label-mass-low",
        bad,
        "a sum of 0.99",
        dense,
        poke("labels.probs", 0, struct.pack("<4e", 0.99, 0, 0, 0)),
    )
    yield "adapter-nan", "E_ADAPTER", "NaN", "adapter-f16", poke("adapter.values", 4, nan)
    yield (
        "adapter-scale",
        "E_ADAPTER",
        "an infinite scale",
        "adapter-i8",
        poke("adapter.scales", 0, inf),
    )
    yield (
        "adapter-code",
        "E_ADAPTER",
        "the code -128",
        "adapter-i8",
        poke("adapter.codes", 3, b"\x80"),
    )
    bad = "E_PROBE"
    yield (
        "probe-class",
        bad,
        "class 4 of 4",
        "probes",
        poke("probes.labels", 0, struct.pack("<I", 4)),
    )
    yield (
        "probe-image",
        bad,
        "image 6 of 6",
        "probes",
        poke("probes.indices", 0, struct.pack("<I", 6)),
    )
    yield (
        "probe-twice",
        bad,
        "two probes of one image",
        "probes",
        lambda draft: (
            draft.poke("probes.labels", 0, bytes(8)).poke("probes.indices", 0, bytes(8)).seal()
            and None
        ),
    )
