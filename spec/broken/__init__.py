"""The invalid half of the corpus: files that break one rule and, where possible, no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from draft import Draft

from broken import codecs, header, manifest, recipe, sections, spelling, values
from broken.case import Raw


def broken(files: Mapping[str, bytes]) -> Iterator[Raw]:
    """Yield name, expected code, what it breaks, and the bytes."""
    drafts = {name: Draft(data) for name, data in files.items()}
    yield from header.cases(files["prompts-f16"])
    for family in (spelling, manifest, recipe, sections, codecs, values):
        for name, code, breaks, source, edit in family.cases():
            draft = drafts[source].copy()
            out = edit(draft)
            yield name, code, breaks, out if isinstance(out, bytes) else draft.bytes()
