"""From real images to a pack: settings, methods, and the driver that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.encode.allocation import Allocation
    from d3pack.encode.contract import (
        Draft,
        EncodeContext,
        EncodeRun,
        Estimate,
        Job,
        Method,
        NoSettings,
        method_settings,
        methods,
        open_method,
    )
    from d3pack.encode.driver import encode, estimate_encode
    from d3pack.encode.plan import EncodePlan, dtype_for, sigmas_of
    from d3pack.encode.settings import (
        ClassCondSettings,
        D3MSettings,
        EncodeSettings,
        MinimaxSettings,
        d3m_settings,
    )
    from d3pack.encode.teaching import open_teacher

__all__ = [
    "Allocation",
    "ClassCondSettings",
    "D3MSettings",
    "Draft",
    "EncodeContext",
    "EncodePlan",
    "EncodeRun",
    "EncodeSettings",
    "Estimate",
    "Job",
    "Method",
    "MinimaxSettings",
    "NoSettings",
    "d3m_settings",
    "dtype_for",
    "encode",
    "estimate_encode",
    "method_settings",
    "methods",
    "open_method",
    "open_teacher",
    "sigmas_of",
]

__getattr__ = lazy_names(
    __name__,
    {
        "allocation": ["Allocation"],
        "contract": [
            "Draft",
            "EncodeContext",
            "EncodeRun",
            "Estimate",
            "Job",
            "Method",
            "NoSettings",
            "method_settings",
            "methods",
            "open_method",
        ],
        "driver": ["encode", "estimate_encode"],
        "plan": ["EncodePlan", "dtype_for", "sigmas_of"],
        "settings": [
            "ClassCondSettings",
            "D3MSettings",
            "EncodeSettings",
            "MinimaxSettings",
            "d3m_settings",
        ],
        "teaching": ["open_teacher"],
    },
)
