"""The `d3pack` command: parse, call, print."""

from __future__ import annotations

import os
import sys
from typing import Any

from d3pack.cli import _out
from d3pack.errors import D3MError, NotFoundError

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


def __getattr__(name: str) -> Any:
    """`app`, the typer application, is built when somebody asks for it."""
    if name == "app":
        from d3pack.cli._app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command; every expected failure is one line and an exit code."""
    if sys.stdout is None:  # the next file that is opened would take its place
        _out.fail(D3MError("standard output is closed", hint="send it to /dev/null"))
        sys.exit(D3MError.exit_code)
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
        # Whoever read has seen enough.
        _silence()
        return 1
    except OSError as error:
        failure = _failure(error)
        _out.fail(failure)
        _silence()
        return failure.exit_code
    except KeyboardInterrupt:
        _out.interrupted()
        return INTERRUPTED
    return code


def _silence() -> None:
    """Leave nothing that could fail once more when Python closes its output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failure(error: OSError) -> D3MError:
    """What the system refused and no verb has said better: a full disk, a folder of another's."""
    what = error.strerror or str(error) or type(error).__name__
    text = f"{error.filename}: {what}" if error.filename is not None else what
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return NotFoundError(text) if missing else D3MError(text)


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
