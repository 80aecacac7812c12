"""Packages that only some features need, and the extra of d3pack that installs each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from d3pack.errors import UsageError

# import name: (package to install, extra of d3pack that installs it)
EXTRAS = {
    "accelerate": ("accelerate", "encode"),
    "adlfs": ("adlfs", "az"),
    "datasets": ("datasets", "encode"),
    "gcsfs": ("gcsfs", "gs"),
    "matplotlib": ("matplotlib", "eval"),
    "model_signing": ("model-signing", "sign"),
    "pyarrow": ("pyarrow", "encode"),
    "ray": ("ray", "ray"),
    "s3fs": ("s3fs", "s3"),
    "sklearn": ("scikit-learn", "demo"),
    "threadpoolctl": ("threadpoolctl", "encode"),
}


def require(module: str, purpose: str = "this feature") -> Any:
    """Import a module of an optional package.

    Args:
        module: such as "pyarrow.parquet".
        purpose: what needs it, for the message, such as "parquet output".

    Returns:
        The imported module.

    Raises:
        UsageError: the package cannot be imported; the message names the extra that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        reason = f" ({error})" if error.name != top else ""  # installed, but not what it needs
        raise _missing(top, purpose, reason) from None


def load(place: str, purpose: str) -> Any:
    """Return what "module:name" names.

    Raises:
        UsageError: the module imports a missing package; the message names the extra that
            installs it.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        raise (_missing(top, purpose) if top in EXTRAS else error) from None


def _missing(top: str, purpose: str, reason: str = "") -> UsageError:
    package, extra = EXTRAS[top]
    return UsageError(
        f"{purpose} needs the package {package!r}{reason}",
        hint=f"pip install 'd3pack[{extra}]'",
    )
