"""Class names: from folder names, WordNet ids, or a table that maps one to the other."""

from __future__ import annotations

import csv
import json
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources.links import leads_out
from d3pack.system import ObjectPath

_log = logging.getLogger(__name__)

MAX_TABLE = 16 * 1024 * 1024
WORDNET = re.compile(r"n\d{8}")
CLASSES = (".classes.json", "classes.json")  # in a tree; `decode` writes the first
# tables that often lie beside folders of WordNet ids
NEIGHBOURS = ("class_names.json", "class_names.csv", "LOC_synset_mapping.txt", "words.txt")


def read_table(path: Path | ObjectPath) -> dict[str, str]:
    """Return names by class key (folder name, or number as text) from a .json, .csv or .txt file.

    Raises:
        NotFoundError: there is no such file.
        SourceError: it is not a table of names.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no table of class names {path.name}")
    if path.stat().st_size > MAX_TABLE:
        raise SourceError(f"{path.name} is too large for a table of class names")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _from_json(json.loads(text, object_pairs_hook=_unique))
        if path.suffix == ".csv":
            return _from_rows([row for row in csv.reader(text.splitlines()) if row])
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise SourceError(
            f"{path.name} is not a table of class names: {error}",
            hint='give JSON {"folder": "name"}, a list, or CSV lines folder,name',
        ) from error
    return _from_lines(text.splitlines())


def _from_json(value: object) -> dict[str, str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {str(index): name for index, name in enumerate(value)}
    if isinstance(value, dict):
        # {"0": ["n01440764", "tench"]}, the class index of Keras
        if value and all(isinstance(v, list) and len(v) == 2 for v in value.values()):
            return _unique([(str(key), str(name)) for key, name in value.values()])
        if all(isinstance(v, str) for v in value.values()):
            return {str(key): name for key, name in value.items()}
    raise ValueError("neither a list of names nor an object of names")


def _from_rows(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    if any(len(row) < 2 for row in rows):
        raise ValueError("a line has fewer than two columns")
    header = [cell.strip().casefold() for cell in rows[0][:2]] if rows else []
    if header and header[1] in {"name", "class", "label", "class_name"}:
        rows = rows[1:]
    return _unique([(row[0].strip(), row[1]) for row in rows])


def _from_lines(lines: Sequence[str]) -> dict[str, str]:
    rows = [line.strip() for line in lines if line.strip()]
    if all(WORDNET.match(row) for row in rows):
        pairs = [re.split(r"[\s,]+", row, maxsplit=1) for row in rows]
        # "tench, Tinca tinca": the first synonym is the name
        return _unique([(p[0], p[1].split(",")[0] if len(p) > 1 else p[0]) for p in pairs])
    return {str(index): row for index, row in enumerate(rows)}


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, name in pairs:
        if table.setdefault(key, name) != name:
            raise SourceError(f"the table of class names gives {key!r} two names")
    return table


def tidy(name: str) -> str:
    """Return a name in one spelling: composed Unicode, single spaces for blanks and underscores."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def neighbour_table(keys: Sequence[str], *folders: Path | ObjectPath) -> Mapping[str, str] | None:
    """Return the table that lies beside the folders, if there is one.

    `.classes.json`, which `decode` writes into the first of them, or `classes.json` counts where it
    names all keys; other tables count beside WordNet ids. Links that lead out of their folder do
    not count: a stranger's folder could name any file of this machine.
    """
    for name in CLASSES:
        if _is_outside(folders[0], name):
            continue
        table = _table_or_none(folders[0] / name)
        if table is not None and table.keys() >= set(keys):
            return table
    if not all(WORDNET.fullmatch(key) for key in keys):
        return None
    for folder in folders:
        for name in NEIGHBOURS:
            if not _is_outside(folder, name) and (folder / name).is_file():
                return read_table(folder / name)
    return None


def _is_outside(folder: Path | ObjectPath, name: str) -> bool:
    """Return whether a file of a folder is a link that leads out of it, for which it is logged."""
    outside = leads_out(folder / name, folder)
    if outside:
        _log.warning("%s beside the images is not used: a link that leads out of its folder", name)
    return outside


def _table_or_none(path: Path | ObjectPath) -> Mapping[str, str] | None:
    """Return the table of a file; None where there is none, for which a reason is logged."""
    try:
        return read_table(path)
    except NotFoundError:
        return None
    except SourceError as error:  # a file of that name may hold anything
        _log.warning("%s beside the images is not used: %s", path.name, error.args[0])
        return None


def name_classes(keys: Sequence[str], table: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the names of all classes in the order of their keys.

    Raises:
        SourceError: a class has no name, or two have the same.
    """
    if table is None:
        raw = list(keys)
    else:
        missing = [key for i, key in enumerate(keys) if key not in table and str(i) not in table]
        if missing:
            raise SourceError(
                f"{len(missing)} classes have no name in the table, first {missing[0]!r}",
                hint="add them, or leave the table out to use the folder names",
            )
        raw = [table[key] if key in table else table[str(i)] for i, key in enumerate(keys)]
    names = [tidy(name) for name in raw]
    seen: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if not name or not name.isprintable() or len(name) > 200:
            raise SourceError(
                f"class {key!r} has no usable name", hint="give a table of class names"
            )
        if name in seen:
            raise SourceError(
                f"two classes have the name {name!r}: {seen[name]!r} and {key!r}",
                hint="give them different names in a table of class names",
            )
        seen[name] = key
    return tuple(names)
