"""Kill or starve a writer at every step and say what was left: run by test_format_writer.py.

    python format_crash.py FOLDER OLD NEW      prints one JSON list

Each case is a fork, so that SIGKILL is a real one. Writes are cut to small pieces, so that there
are several of them, and half a piece is written before the fault.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from d3pack.errors import D3MError
from d3pack.system import files

PIECE = 700


class Fault:
    """Counts the steps of a write and strikes at one of them."""

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind, self.steps = at, kind, 0

    def step(self) -> None:
        if self.steps == self.at:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        self.steps += 1


def install(fault: Fault) -> None:
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "chmod")}

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            fault.step()
            return real[name](*args, **kwargs)

        return call

    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            piece = memoryview(data)[:PIECE]
            super().write(piece[: len(piece) // 2])
            fault.step()
            return len(piece) // 2 + super().write(piece[len(piece) // 2 :])

    for name in real:
        setattr(os, name, wrapped(name))
    files.open = lambda path, mode, buffering: Slow(path, mode)  # type: ignore[attr-defined]


def case(path: Path, new: bytes, at: int, kind: str) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        fault = Fault(at, kind)
        if kind == "limit":  # the kernel's own refusal, in the middle of a write
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        else:
            install(fault)
        try:
            files.replace_file(path, new)
        except D3MError:
            os._exit(1)
        except BaseException:
            os._exit(99)
        os._exit(0 if fault.steps <= at else 98)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status)
    return {
        "kind": kind,
        "at": at,
        "exit": -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status),
        "left": path.read_bytes().hex() if path.exists() else "",
        "temporaries": len([p for p in path.parent.iterdir() if p != path]),
    }


def main() -> None:
    folder, old, new = (
        Path(sys.argv[1]),
        Path(sys.argv[2]).read_bytes(),
        Path(sys.argv[3]).read_bytes(),
    )
    out = []
    for kind in ("kill", "space", "limit"):
        for exists in (True, False):
            for at in range(1000):
                place = folder / f"{kind}-{exists}-{at}"
                place.mkdir()
                path = place / "pack.d3m"
                if exists:
                    path.write_bytes(old)
                step = at * 1000 if kind == "limit" else at
                result = case(path, new, step, kind)
                out.append({**result, "exists": exists})
                if result["exit"] == 0:  # this step is beyond the last one
                    break
    print(json.dumps(out))


main()
