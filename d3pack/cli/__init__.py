"""The `d3pack` command: parse, call, print."""

from __future__ import annotations

import os
import sys
from typing import Any

from d3pack.cli import _out
from d3pack.errors import D3MError

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


def __getattr__(name: str) -> Any:
    """`app`, the typer application, is built when somebody asks for it."""
    if name == "app":
        from d3pack.cli._app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command; every expected failure is one line and an exit code."""
    _out.listen()
    sys.exit(_status(sys.argv[1:]))


def _status(args: list[str]) -> Any:
    try:
        code = 0 if _at_once(args) else _parsed()
        sys.stdout.flush()
    except D3MError as error:
        _out.fail(error)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read has seen enough. Nothing is left to say when Python closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _out.interrupted()
        return INTERRUPTED
    return code


def _parsed() -> Any:
    """The verbs by typer, which answers to Ctrl-C with a code and no word."""
    from d3pack.cli._app import app

    try:
        app()
    except SystemExit as leave:
        if leave.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return leave.code
    return 0


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
