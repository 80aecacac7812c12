"""Work for workers in tests: units are files, and a worker can be told to fail or to die."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3pack.errors import SourceError
from d3pack.system import Events, Listener, Shard, WaitingError

UNITS = 8


@dataclass
class Toy:
    """Writes a file for each unit, then one more when all are there.

    Files named `die-N`, `fail-N` and `bad-N` tell the worker of shard N what happens to it; the
    first two hold how many times. `slow-N` holds for how many seconds it works on its last unit,
    and then on something else.
    """

    folder: Path

    def open(self, listen: Listener) -> None:
        self._events = Events([listen])

    def do(self, shard: Shard) -> None:
        units = [unit for unit in range(UNITS) if shard.owns(unit)]
        path = self.folder / f"slow-{shard.number}"
        slow = float(path.read_text()) if path.exists() else 0.0
        with self._events.stage("write", len(units), "files"):
            for done, unit in enumerate(units):
                if unit == units[-1]:
                    time.sleep(slow)
                if not (self.folder / f"unit-{unit}").exists():
                    with open(self.folder / f"unit-{unit}", "x") as file:  # no unit twice
                        file.write(f"{os.getpid()}")
                self._events.step(done + 1)
                if self._told("die", shard):
                    os._exit(1)
                if self._told("fail", shard):
                    raise OSError(5, "storage fails")
        time.sleep(slow)
        if (self.folder / f"bad-{shard.number}").exists():
            raise SourceError("no image can be read", hint="look at them")
        if not all((self.folder / f"unit-{unit}").exists() for unit in range(UNITS)):
            raise WaitingError("others have not finished")
        (self.folder / f"shard-{shard.number}").touch()

    def _told(self, what: str, shard: Shard) -> bool:
        path = self.folder / f"{what}-{shard.number}"
        times = int(path.read_text()) if path.exists() else 0
        if times:
            path.write_text(f"{times - 1}")
        return times > 0

    def finish(self, count: int) -> Any:
        assert all((self.folder / f"shard-{n}").exists() for n in range(1, count + 1))
        self._events.note("put together")
        return {(self.folder / f"unit-{unit}").read_text() for unit in range(UNITS)}
