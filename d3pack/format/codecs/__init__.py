"""Codecs: how prompts, picks, labels, adapters and files are stored.

The set is closed: a codec's name means the same bytes for every reader. To add one, write its class
and a line in `table.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.format.codecs.adapter import decode_adapter, encode_adapter
    from d3pack.format.codecs.files import decode_files, encode_files
    from d3pack.format.codecs.labels import decode_labels, encode_labels, restrict_labels
    from d3pack.format.codecs.picks import decode_picks, encode_picks
    from d3pack.format.codecs.prompts import decode_prompts, encode_prompts
    from d3pack.format.codecs.table import ADAPTER_CODECS, LABEL_CODECS, PROMPT_CODECS

__all__ = [
    "ADAPTER_CODECS",
    "LABEL_CODECS",
    "PROMPT_CODECS",
    "decode_adapter",
    "decode_files",
    "decode_labels",
    "decode_picks",
    "decode_prompts",
    "encode_adapter",
    "encode_files",
    "encode_labels",
    "encode_picks",
    "encode_prompts",
    "restrict_labels",
]

__getattr__ = lazy_names(
    __name__,
    {
        "adapter": ["decode_adapter", "encode_adapter"],
        "files": ["decode_files", "encode_files"],
        "labels": ["decode_labels", "encode_labels", "restrict_labels"],
        "picks": ["decode_picks", "encode_picks"],
        "prompts": ["decode_prompts", "encode_prompts"],
        "table": ["ADAPTER_CODECS", "LABEL_CODECS", "PROMPT_CODECS"],
    },
)
