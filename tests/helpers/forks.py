"""Real `d3pack` processes at the price of a fork: the heavy libraries are imported once.

with Forks() as forks:
    run = forks.start("encode", "photos", "-o", "x.d3m", cwd=tmp_path)
    run.until("learning")             # waits for words on stderr or stdout
    run.interrupt()                   # SIGINT to its group, as a terminal sends it
    code, out, err = run.result()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = """
import json, os, signal, sys, threading
import torch
import d3pack.demo, d3pack.train.run, d3pack.encode.methods.d3m.method, d3pack.hub
import diffusers.models.unets.unet_2d_condition, transformers.models.clip.modeling_clip
import diffusers.models.autoencoders.autoencoder_tiny
from d3pack.cli import main
torch.set_num_threads(1)

def tell(**what):
    sys.stdout.write(json.dumps(what) + "\\n")
    sys.stdout.flush()

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fd)
        os.chdir(job["cwd"])
        sys.argv = ["d3pack", *job["args"]]
        main()
    tell(pid=child)
    threading.Thread(
        target=lambda pid: tell(pid=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])),
        args=[child], daemon=True,
    ).start()
"""


class Run:
    """One process: what it says is in two files."""

    def __init__(self, pid: int, folder: Path, wait: Callable[[], int]) -> None:
        self.pid = pid
        self._folder, self._wait = folder, wait

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text(encoding="utf-8")

    def until(self, condition: str | Callable[[], object], seconds: float = 120) -> None:
        """Wait for words that it says, or for something that it does."""
        end = time.monotonic() + seconds
        while not (condition in self.out + self.err if isinstance(condition, str) else condition()):
            os.kill(self.pid, 0)  # an error that says what happened, where it is over already
            assert time.monotonic() < end, f"no {condition!r} in:\n{self.out}{self.err}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        os.killpg(self.pid, signal.SIGINT)

    def result(self) -> tuple[int, str, str]:
        return self._wait(), self.out, self.err


class Forks:
    """The server; `env` is its environment beside the one here."""

    def __init__(self, **env: str) -> None:
        self._room = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self._codes: dict[int, int] = {}
        self._count = 0

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()
        self._room.cleanup()

    def start(self, *args: object, cwd: Path) -> Run:
        self._count += 1
        folder = Path(self._room.name) / str(self._count)
        folder.mkdir()
        job = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd),
            "out": str(folder / "out"),
            "err": str(folder / "err"),
        }
        for name in ("out", "err"):
            (folder / name).touch()
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        while "code" in (said := self._said()):
            self._codes[said["pid"]] = said["code"]
        pid: int = said["pid"]
        return Run(pid, folder, lambda: self._code(pid))

    def _said(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        said: dict[str, Any] = json.loads(self._server.stdout.readline())
        return said

    def _code(self, pid: int) -> int:
        while pid not in self._codes:
            said = self._said()
            self._codes[said["pid"]] = said["code"]
        return self._codes[pid]
