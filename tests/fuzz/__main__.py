"""Hand damaged files and answers to d3pack: only D3MError may come out.

    python tests/fuzz TARGET [-n COUNT] [--seed N] [--seconds S]

`python tests/fuzz --help` lists the targets; packs have a mutator of their own, `spec/fuzz.py`.
Prints one JSON document: how many inputs were refused with which code, and the slowest. The number
of an input that broke the promise is printed; `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fuzz_targets import TARGETS

from d3pack.errors import D3MError

MEMORY = 4 << 30  # bytes of address space beside what is there when the run begins
SLOW = 10.0  # seconds that one input may take


def fuzz(target: str, count: int, *, first: int = 0, seconds: float = 1e9) -> dict[str, object]:
    """Give a target inputs of these numbers; return what came out."""
    codes: Counter[str] = Counter()
    faults: list[int] = []
    slowest, slow_at, done = 0.0, first, 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = TARGETS[target](Path(folder))
        _limit_memory()
        began = time.monotonic()
        for number in range(first, first + count):
            at = time.monotonic()
            if at - began > seconds:
                break
            try:
                run(random.Random(f"{target} {number}"))
                codes["accepted"] += 1
            except D3MError as error:
                codes[error.code] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                faults.append(number)
                traceback.print_exc()
            took = time.monotonic() - at
            if took > slowest:
                slowest, slow_at = took, number
            if took > SLOW:
                faults.append(number)
            done += 1
    return {
        "target": target,
        "inputs": done,
        "codes": dict(codes.most_common()),
        "faults": faults,
        "slowest": {"number": slow_at, "seconds": round(slowest, 3)},
    }


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("-n", type=int, default=10_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--only", type=int, help="one input")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    first, count = (args.seed, args.n) if args.only is None else (args.only, 1)
    found = fuzz(args.target, count, first=first, seconds=args.seconds)
    print(json.dumps(found, indent=2))
    return bool(found["faults"])


if __name__ == "__main__":
    sys.exit(main())
