"""The language of the project: docs/glossary.md has one word for each idea."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

# names and phrases that the glossary replaces
RETIRED = re.compile(
    r"\b(Told|Diet|Held|Lesson|Exams|Judge|Dials|Squeeze|hurry|shelf|lesson_for|EncodeOptions"
    r"|EvalOptions|TrainOptions|is no size|is no time|cannot.be.meant|reads real CIFAR-10"
    r"|says nothing|[Ww]hoever)\b"
)
CODE = ("d3pack", "mini", "tests", "benchmarks", "examples", "spec")
FILES = [
    *(
        path
        for folder in CODE
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__)
    ),
    *sorted((ROOT / "spec").glob("*.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "glossary.md"),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_uses_the_words_of_the_glossary(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [match[0] for match in RETIRED.finditer(text)] == []


def test_values_are_not_called_found() -> None:
    """A name says what it holds."""
    for path in (ROOT / "d3pack").rglob("*.py"):
        assert not re.search(r"^\s+found = ", path.read_text(encoding="utf-8"), re.MULTILINE), path
