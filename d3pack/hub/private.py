"""A guard before anything is published: local paths and secrets do not leave the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3pack.errors import UsageError
from d3pack.format.pack import Pack
from d3pack.hub.card import flat

# An absolute path with at least one folder, on any system; the path part of a URL is not one.
_PATH = re.compile(
    r"(?:(?<![\w/:.~-])|^)(?:(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|]+[/\\])+|~[/\\])[\w.~-]+"
)
_SHORTEST = 4  # a home of "/" would be found everywhere


def check_private(pack: Pack, files: Mapping[str, bytes]) -> None:
    """Refuse to publish a pack or a file that tells about this machine."""
    manifest = pack.manifest
    for part in ("provenance", "optional", "recipe"):
        for name, text in flat(manifest[part], part):
            found = _PATH.search(text)
            if found and not name.startswith("recipe.backbone.files"):
                raise UsageError(
                    f"the pack's {name} holds a local path: {found[0]!r}",
                    hint="encode it again without that option, or edit its provenance",
                )
    for path, data in files.items():
        for what, secret in _secrets().items():
            # The card escapes what Markdown would act on.
            if secret.encode() in data or secret.encode() in data.replace(b"\\", b""):
                raise UsageError(
                    f"{path} holds {what} of this machine",
                    hint="remove it (for a pack: encode again) before publishing",
                )


def _secrets() -> dict[str, str]:
    """What must not be in any published byte, by what it is called."""
    from huggingface_hub import get_token

    home = Path.home()
    known: dict[str, Any] = {
        "the home directory": str(home) if len(home.parts) > 1 else "",
        "the working directory": str(Path.cwd()) if len(Path.cwd().parts) > 2 else "",
        "the Hub token": get_token() or "",
        "a token": os.environ.get("HUGGING_FACE_HUB_TOKEN", ""),
    }
    return {what: text for what, text in known.items() if len(text) >= _SHORTEST}
