"""Entries of sections, and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    source, code = "everything", "E_SECTION"

    def edit(change: Callable[[Draft, list[Any]], Any]) -> Edit:
        def run(draft: Draft) -> None:
            change(draft, draft.manifest["sections"])
            draft.reroot()

        return run

    yield (
        "sections-object",
        code,
        "not an array",
        source,
        edit(lambda d, s: d.manifest.update(sections={})),
    )

    def put(place: int, part: int, value: Any) -> Callable[[Draft, list[Any]], Any]:
        return lambda draft, sections: sections[place].__setitem__(part, value)

    yield "section-prompts-missing", code, "no prompts", source, edit(lambda d, s: s.pop(2))
    yield "section-leaves-missing", code, "no leaves", source, edit(lambda d, s: s.pop(1))
    yield "section-classes-missing", code, "no class names", source, edit(lambda d, s: s.pop(0))
    yield (
        "section-order",
        code,
        "labels before picks",
        source,
        edit(lambda d, s: s.__setitem__(slice(3, 5), s[4:2:-1])),
    )
    yield "section-twice", code, "prompts twice", source, edit(lambda d, s: s.insert(3, s[2]))
    yield (
        "section-unknown",
        code,
        "a section that no optional feature declares",
        "newer-minor",
        edit(lambda d, s: d.manifest["optional"].pop("captions")),
    )
    yield "section-field", code, "a fifth part", source, edit(lambda d, s: s[0].append(1))
    yield "section-no-params", code, "no parameters", source, edit(lambda d, s: s[2].__delitem__(2))
    yield "section-entry", code, "two parts", source, edit(lambda d, s: s[3].__delitem__(2))
    yield (
        "section-object",
        code,
        "an entry as an object",
        source,
        edit(lambda d, s: s.__setitem__(2, {"name": "prompts", "codec": "pq", "params": {}})),
    )
    yield "section-codec", code, "the codec is a number", source, edit(put(2, 1, 16))
    yield "section-params-array", code, "params is an array", source, edit(put(2, 2, []))
    yield "section-name", code, "a name with a dot", source, edit(put(2, 0, "a.b"))
    yield "section-pad", code, "a name that nobody declares", source, edit(put(6, 0, "pad"))
    yield "section-many", code, "65 sections", source, edit(lambda d, s: s.extend(s[:1] * 60))
    yield "section-hash-case", code, "a hash in capitals", source, edit(put(1, 3, "AB" * 16))
    yield "section-hash-long", code, "a whole SHA-256", source, edit(put(1, 3, "ab" * 32))
    yield "section-hash-null", code, "null for a hash", source, edit(put(1, 3, None))
    yield (
        "section-hash-missing",
        code,
        "shared bytes without a hash",
        source,
        edit(lambda d, s: s[0].pop()),
    )
    yield (
        "section-hash-needless",
        code,
        "a hash of no shared byte",
        source,
        edit(lambda d, s: s[3].append(hashlib.sha256(b"").hexdigest()[:32])),
    )
