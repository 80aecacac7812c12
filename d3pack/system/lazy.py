"""Packages whose public names are imported on first use (PEP 562).

A room lists its public names in `__init__.pyi`, as ordinary imports: type checkers and editors read
them there, and `attach` makes the same names available at run time.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from d3pack.system.extras import load


def attach(package: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and a `__getattr__` for a package with an `__init__.pyi` beside it.

    Args:
        package: `__name__` of the package.
        file: `__file__` of the package.
    """
    stub = Path(file).with_name("__init__.pyi").read_text(encoding="utf-8")
    homes = {
        alias.name: node.module
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:  # a module of the room
            return import_module(f"{package}.{name}")
        return load(f"{homes[name]}:{name}", f"{package}.{name}")

    return sorted(homes), find
