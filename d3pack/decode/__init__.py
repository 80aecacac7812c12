"""Packs to images: with exact numerics, or fast ones on request.

`noise` and `samplers` are public modules of this room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.decode import noise, samplers
    from d3pack.decode.carried import backbone_path, local_backbone, unpack_backbone
    from d3pack.decode.decoder import Decoder
    from d3pack.decode.export import (
        ExportReport,
        ExportSettings,
        class_folder,
        export_images,
        select_classes,
    )
    from d3pack.decode.numerics import Numerics, choose_numerics, exact_numerics, reproducible_cuda
    from d3pack.decode.probes import ProbeReport, make_probes, verify_probes

__all__ = [
    "Decoder",
    "ExportReport",
    "ExportSettings",
    "Numerics",
    "ProbeReport",
    "backbone_path",
    "choose_numerics",
    "class_folder",
    "exact_numerics",
    "export_images",
    "local_backbone",
    "make_probes",
    "noise",
    "reproducible_cuda",
    "samplers",
    "select_classes",
    "unpack_backbone",
    "verify_probes",
]

__getattr__ = lazy_names(
    __name__,
    {
        "carried": ["backbone_path", "local_backbone", "unpack_backbone"],
        "decoder": ["Decoder"],
        "export": [
            "ExportReport",
            "ExportSettings",
            "class_folder",
            "export_images",
            "select_classes",
        ],
        "numerics": ["Numerics", "choose_numerics", "exact_numerics", "reproducible_cuda"],
        "probes": ["ProbeReport", "make_probes", "verify_probes"],
    },
)
