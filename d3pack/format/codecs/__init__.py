"""Codecs: values <-> the few bytes that stand for them. Closed: the bytes must mean one thing."""

from __future__ import annotations

from d3pack.format.codecs.adapter import decode_adapter, encode_adapter
from d3pack.format.codecs.files import decode_files, encode_files
from d3pack.format.codecs.labels import decode_labels, encode_labels, restrict_labels
from d3pack.format.codecs.picks import decode_picks, encode_picks
from d3pack.format.codecs.prompts import decode_prompts, encode_prompts

__all__ = [
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
