"""A backbone that travels inside the pack: the optional feature of section 8a."""

from __future__ import annotations

import hashlib

from d3pack.errors import BackboneChangedError, InvalidPackError
from d3pack.format.codecs import decode_files
from d3pack.format.pack import EMBEDDED, Pack


def carried_files(pack: Pack) -> dict[str, bytes] | None:
    """The files of the carried backbone, held to the lock; None when the pack carries none.

    An optional feature is no part of what makes a file a pack, so `read` passes it on as it is;
    whoever writes, verifies or uses it asks here.
    """
    coded = pack.extensions.get(EMBEDDED)
    if coded is None and EMBEDDED not in pack.optional:
        return None
    if coded is None or pack.optional.get(EMBEDDED) != {}:
        raise InvalidPackError(
            "backbone: the feature must be {} and have a section of its name", code="E_CODEC"
        )
    locks = pack.recipe.backbone.files
    files = decode_files(coded, {path: lock.size for path, lock in locks.items()})
    for path, data in files.items():
        if hashlib.sha256(data).hexdigest() != locks[path].sha256:
            raise BackboneChangedError(
                f"{path} of the carried backbone is not the one that the recipe names",
                hint="the pack was put together wrongly: ask its maker for another",
            )
    return files
