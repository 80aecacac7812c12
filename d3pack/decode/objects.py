"""An export into an object store: what its mark says, without a lock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from d3pack.errors import UsageError
from d3pack.system import ObjectPath, replace_file


@contextmanager
def claimed_objects(path: ObjectPath, mark: Mapping[str, Any]) -> Iterator[None]:
    """Write the mark of an export to `path`, or check that the one there is the same.

    Stores have no locks. Two exports with one mark write equal objects, so they only waste work.
    """
    output = path.parent
    used = output.exists()  # in this order: another export may have just begun
    if not path.exists():
        if used:
            raise UsageError(f"{output} is not empty", hint="choose an empty folder")
        replace_file(path, (json.dumps(mark, indent=1, ensure_ascii=False) + "\n").encode())
    try:
        is_same = json.loads(path.read_bytes()) == mark
    except ValueError:
        is_same = False
    if not is_same:
        raise UsageError(f"{output} holds another export", hint="choose an empty folder")
    yield
