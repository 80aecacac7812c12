"""Packs on the Hugging Face Hub, through `huggingface_hub` and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.hub.address import Address, is_address, parse_address
    from d3pack.hub.download import (
        Pulled,
        RemoteInfo,
        load,
        local_path,
        pull,
        read_classes,
        remote_info,
    )
    from d3pack.hub.publish import (
        Parcel,
        Pushed,
        PushSettings,
        check_login,
        prepare_push,
        push,
        send_push,
    )
    from d3pack.hub.signatures import Trust

__all__ = [
    "Address",
    "Parcel",
    "Pulled",
    "PushSettings",
    "Pushed",
    "RemoteInfo",
    "Trust",
    "check_login",
    "is_address",
    "load",
    "local_path",
    "parse_address",
    "prepare_push",
    "pull",
    "push",
    "read_classes",
    "remote_info",
    "send_push",
]

__getattr__ = lazy_names(
    __name__,
    {
        "address": ["Address", "is_address", "parse_address"],
        "download": [
            "Pulled",
            "RemoteInfo",
            "load",
            "local_path",
            "pull",
            "read_classes",
            "remote_info",
        ],
        "publish": [
            "Parcel",
            "PushSettings",
            "Pushed",
            "check_login",
            "prepare_push",
            "push",
            "send_push",
        ],
        "signatures": ["Trust"],
    },
)
