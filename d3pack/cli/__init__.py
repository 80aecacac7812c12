"""The `d3pack` command: parse, call, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from d3pack.cli import _out
from d3pack.errors import D3MError, NotFoundError

INTERRUPTED = 130  # what a shell calls a command that Ctrl-C ended


def run(args: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit code.

    Raises:
        D3MError: if it fails; `main` prints it.
    """
    match args:
        case ["info", pack] if pack[:1] not in "-~":  # click would add a fifth to its time
            from d3pack.cli.info import Info

            Info(pack).run()
            return 0
    from d3pack.cli._command import execute

    return execute(args)


def main() -> None:
    """Run the command; every expected failure is one line and an exit code."""
    if sys.stdout is None:  # the next file that is opened would take its place
        _out.fail(D3MError("standard output is closed", hint="send it to /dev/null"))
        sys.exit(D3MError.exit_code)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    for stream in (sys.stdout, sys.stderr):  # of a locale that lacks a letter of a class name
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _out.listen()
    sys.exit(_status(sys.argv[1:]))


def _status(args: Sequence[str]) -> int:
    try:
        code = run(args)
        sys.stdout.flush()
    except D3MError as error:
        _out.fail(error)
        return error.exit_code
    except BrokenPipeError:  # the reader has closed its end
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
    """What the system refused and no verb has put into better words."""
    reason = error.strerror or str(error) or type(error).__name__
    text = f"{error.filename}: {reason}" if error.filename is not None else reason
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return NotFoundError(text) if missing else D3MError(text)
