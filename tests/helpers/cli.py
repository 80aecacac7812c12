"""The command in this process: what it prints and how it ends."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from d3pack.cli import _out, run
from d3pack.errors import D3MError


@dataclass(frozen=True)
class Result:
    """What a call of the command leaves; `exception` is the error that it reported."""

    exit_code: int
    stdout: str
    stderr: str
    exception: D3MError | None = None

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(*args: object) -> Result:
    """Run `d3pack` with these words, as a shell would; bugs are raised, not reported."""
    out, err = io.StringIO(), io.StringIO()
    exception = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run([str(arg) for arg in args])
        except D3MError as error:
            _out.fail(error)
            code, exception = error.exit_code, error
    return Result(code, out.getvalue(), err.getvalue(), exception)
