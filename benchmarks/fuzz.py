"""How many damaged inputs d3pack has refused in one way or another: files, answers, configs.

    python -m benchmarks fuzz [TARGET ...] [-n COUNT] [-o RESULTS.json]

Gives targets of `tests/fuzz` inputs that they never had, and adds to what came out before: only a
`D3MError` may come out, within ten seconds and 4 GiB. It goes on behind the last input of an
earlier call; what was counted is kept every five minutes. Exits with 1 if there were faults.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, command, load, save

WHAT = (__doc__ or "").partition("\n")[0]
ROOT = Path(__file__).parents[1]
FIRST = 10**8  # number of the first input: the tests and the workflow take others
CHUNK = 300  # seconds


def targets() -> list[str]:
    """Return the names of all targets."""
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    from fuzz_targets import TARGETS

    return list(TARGETS)


def more(target: str, before: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the figures of a target after `count` more inputs, or as many as a chunk takes."""
    number = before.get("next", FIRST)
    began = time.monotonic()
    words = ["tests/fuzz", target, "-n", count, "--seed", number, "--seconds", CHUNK]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"the fuzzer of {target} ended with {done.returncode} after {number:,}")
    new = json.loads(done.stdout)
    slowest = max(before.get("slowest", new["slowest"]), new["slowest"], key=lambda s: s["seconds"])
    return {
        "inputs": before.get("inputs", 0) + new["inputs"],
        "codes": dict(Counter(before.get("codes", {})) + Counter(new["codes"])),
        "faults": before.get("faults", []) + new["faults"],
        "slowest": slowest,
        "seconds": round(before.get("seconds", 0) + time.monotonic() - began, 1),
        "next": number + new["inputs"],
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    known = targets()
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=WHAT)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"[{', '.join(known)}]")
    parser.add_argument("-n", type=int, default=100_000, help="further inputs for each target")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "fuzz.json")
    args = parser.parse_args(argv)
    if unknown := set(args.targets) - set(known):
        parser.error(f"no target {', '.join(sorted(unknown))}: expected {', '.join(known)}")
    figures = load(args.output)
    for target in args.targets or known:
        left = args.n
        while left > 0:
            before = figures.get(target, {})
            figures[target] = more(target, before, left)
            left -= figures[target]["inputs"] - before.get("inputs", 0)
            save(args.output, WHAT, command("fuzz", argv or []), figures)
            print(f"{target}: {figures[target]['inputs']:,} inputs", file=sys.stderr)
    broken = {target: figure["faults"] for target, figure in figures.items() if figure["faults"]}
    print(broken or "no faults")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main(sys.argv[1:])
