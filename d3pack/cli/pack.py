"""`d3pack info`, `verify`, `diff`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
