"""Packs to images: exact, or fast and declared."""

from __future__ import annotations

from d3pack.decode import noise
from d3pack.decode.decoder import Decoder
from d3pack.decode.embedded import backbone_beside, beside, unpacked
from d3pack.decode.numerics import plain_cuda
from d3pack.decode.probes import ProbeReport, make_probes, verify_probes
from d3pack.decode.samplers import schedule

__all__ = [
    "Decoder",
    "ProbeReport",
    "backbone_beside",
    "beside",
    "make_probes",
    "noise",
    "plain_cuda",
    "schedule",
    "unpacked",
    "verify_probes",
]
