"""The `d3pack` command: parse, call, print."""

from __future__ import annotations

import sys
from typing import Any

from d3pack.cli import _out
from d3pack.errors import D3MError


def __getattr__(name: str) -> Any:
    """`app`, the typer application, is built when somebody asks for it."""
    if name == "app":
        from d3pack.cli._app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command; every expected failure is one line and an exit code."""
    _out.listen()
    try:
        if _at_once(sys.argv[1:]):
            sys.exit(0)
        from d3pack.cli._app import app

        app()
    except D3MError as error:
        _out.fail(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _out.say("interrupted")
        sys.exit(130)


def _at_once(args: list[str]) -> bool:
    """`info FILE`, asked plainly, without typer: its parser takes as long as all the rest."""
    format: Any = "human"
    match args:
        case ["info", file]:
            pass
        case ["info", file, "--format", ("human" | "json" | "quiet") as format]:
            pass
        case _:
            return False
    if file.startswith("-"):
        return False
    from d3pack.cli.describe import show

    show(file, format)
    return True
