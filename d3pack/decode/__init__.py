"""Packs to images: exact, or fast and declared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.decode.decoder import Decoder
    from d3pack.decode.embedded import backbone_path, local_backbone, unpack_backbone
    from d3pack.decode.export import ExportReport, ExportSettings, export_images
    from d3pack.decode.modes import Numerics, choose_numerics, exact_numerics
    from d3pack.decode.names import class_folder, select_classes
    from d3pack.decode.numerics import reproducible_cuda
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
    "reproducible_cuda",
    "select_classes",
    "unpack_backbone",
    "verify_probes",
]

__getattr__ = lazy_names(
    __name__,
    {
        "decoder": ["Decoder"],
        "embedded": ["backbone_path", "local_backbone", "unpack_backbone"],
        "export": ["ExportReport", "ExportSettings", "export_images"],
        "modes": ["Numerics", "choose_numerics", "exact_numerics"],
        "names": ["class_folder", "select_classes"],
        "numerics": ["reproducible_cuda"],
        "probes": ["ProbeReport", "make_probes", "verify_probes"],
    },
)
