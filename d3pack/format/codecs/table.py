"""The codecs of prompts, labels and adapters: here a new one is a class and a line; the format
comes first, see "Where to add" in `docs/architecture.md`.

A codec is named as in the manifest, its class as "module:class" in this package. So the names are
known without importing NumPy, for the help of the command and the checks of settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from d3pack.errors import InvalidPackError

PROMPT_CODECS: Mapping[str, str] = {
    "f16": "prompts:Float16",
    "i8": "prompts:Int8",
    "i4": "prompts:Int4",
    "pq": "prompts:ProductQuantizer",
}
LABEL_CODECS: Mapping[str, str] = {"topk": "labels:TopK", "dense": "labels:Dense"}
ADAPTER_CODECS: Mapping[str, str] = {"f16": "adapter:Float16", "i8": "adapter:Int8"}


def find_codec(table: Mapping[str, str], codec: str, at: str) -> Any:
    """Return the codec of this name; errors name the section `at`."""
    if codec not in table:
        raise InvalidPackError(
            f"{at}: unknown codec {codec!r:.80}", code="E_CODEC", hint=f"known: {', '.join(table)}"
        )
    module, _, name = table[codec].partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)()
