"""d3pack: image-classification datasets as recipes for a diffusion backbone."""

from __future__ import annotations

from typing import Any

from d3pack.system import attach

__all__, _find = attach(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    return _find(name)


def _version() -> str:
    """Return the version of the installation, which comes from the tag."""
    from importlib import metadata  # a tenth of the command's start-up

    try:
        return metadata.version("d3pack")
    except metadata.PackageNotFoundError:  # a source tree that nobody installed
        return "0.dev0"
