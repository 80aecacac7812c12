"""Class names as folder names, and classes as a person asks for them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from d3pack.errors import UsageError

_LONGEST = 48


def slug(name: str) -> str:
    """A name that every file system takes: ASCII letters, digits and underscores."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:_LONGEST].rstrip("_") or "class"


def class_folder(index: int, name: str, classes: int) -> str:
    """The folder of a class: the number keeps the order, and makes equal slugs differ."""
    return f"{index:0{max(5, len(str(classes - 1)))}d}_{slug(name)}"


def select_classes(classes: Sequence[str], wanted: str | None) -> list[int]:
    """Class indices from "cat,dog", "0,5" or "3-7"; names win over numbers."""
    if wanted is None:
        return list(range(len(classes)))
    places = {name: index for index, name in enumerate(classes)}
    if wanted in places:  # a name may hold a comma
        return [places[wanted]]
    found: list[int] = []
    for part in (p.strip() for p in wanted.split(",")):
        first, dash, last = part.partition("-")
        if part in places:
            found.append(places[part])
        elif part.isdecimal() and int(part) < len(classes):
            found.append(int(part))
        elif (
            dash
            and first.isdecimal()
            and last.isdecimal()
            and int(first) <= int(last) < len(classes)
        ):
            found.extend(range(int(first), int(last) + 1))
        else:
            raise UsageError(
                f"there is no class {part!r}",
                hint=f"use names, or numbers from 0 to {len(classes) - 1}",
            )
    return sorted(set(found))
