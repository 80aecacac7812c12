"""Packs to images: exact, or fast and declared."""

from __future__ import annotations

from d3pack.decode.decoder import Decoder
from d3pack.decode.embedded import backbone_beside, beside, unpacked
from d3pack.decode.probes import ProbeReport, make_probes, verify_probes

__all__ = [
    "Decoder",
    "ProbeReport",
    "backbone_beside",
    "beside",
    "make_probes",
    "unpacked",
    "verify_probes",
]
