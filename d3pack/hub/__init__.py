"""Packs on the Hugging Face Hub, through `huggingface_hub` and nothing else."""

from __future__ import annotations

from d3pack.hub.address import Address, is_address, parse
from d3pack.hub.partial import RemoteInfo, read_classes, remote_info
from d3pack.hub.pull import Pulled, load, local_path, pull

__all__ = [
    "Address",
    "Pulled",
    "RemoteInfo",
    "is_address",
    "load",
    "local_path",
    "parse",
    "pull",
    "read_classes",
    "remote_info",
]
