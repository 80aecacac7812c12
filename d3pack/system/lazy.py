"""Packages whose public names are imported on first use (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from d3pack.system.extras import missing_extra


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a module `__getattr__` that imports each public name from its module when asked.

    Args:
        package: `__name__` of the package.
        modules: public names by the module of the package that defines them.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:  # a package of an extra, named in one line
            raise missing_extra(error, f"{package}.{name}") or error from None

    return find
