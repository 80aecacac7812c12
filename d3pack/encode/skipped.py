"""Files that were left out: a stage that is done does not open them again, so the journal knows."""

from __future__ import annotations

from d3pack.sources import Source
from d3pack.system.journal import Journal

_NAME = "skipped"


def remember(journal: Journal, source: Source) -> None:
    """Before a stage that has opened files is called done."""
    found = [[skip.class_name, skip.key, skip.reason] for skip in source.skipped]
    if found and (_NAME not in journal or journal[_NAME] != found):
        journal.record(_NAME, found)


def recall(journal: Journal, source: Source) -> None:
    """Open them once more: they are listed again, or an error where files may not be bad."""
    if _NAME not in journal:
        return
    for class_name, key, _ in journal[_NAME]:
        if class_name not in source.classes:
            continue  # refused by name: the source has listed it already
        c = source.classes.index(class_name)
        names = list(source.names(c))
        if key in names:
            source.get(c, names.index(key))
