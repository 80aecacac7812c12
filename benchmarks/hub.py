"""What opening a pack on the Hub costs: requests and bytes, through huggingface_hub itself.

    python -m benchmarks hub [-o RESULTS.json]

The Hub is the loopback server of the test suite, which redirects large files to a second origin as
the real one does; a redirect that is followed counts as a request of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hub_loopback import LoopbackHub

from benchmarks.results import RESULTS, command, save

WHAT = (__doc__ or "").partition("\n")[0]

SMALL, LARGE = "hf://datasets/org/small/small.d3m", "hf://datasets/org/large/large.d3m"


def measure(hub: LoopbackHub, call: Callable[[], object]) -> dict[str, Any]:
    """Run a call, and say what reached the Hub."""
    hub.seen.clear()
    call()
    return {
        "requests": len(hub.seen),
        "methods": " ".join(seen.method for seen in hub.seen),
        "bytes": sum(seen.sent for seen in hub.seen),
    }


def run(hub: LoopbackHub) -> dict[str, Any]:
    """All rows; the cache is cold at the first and warm as a row says."""
    from hub_packs import make_pack

    from d3pack import hub as d3hub
    from d3pack.format import pack_bytes

    small, large = pack_bytes(make_pack(10, 10)), pack_bytes(make_pack(1000, 2))
    hub.put("org/small", {"small.d3m": small})
    hub.put("org/large", {"large.d3m": large})
    rows = {"open 10 classes, cold": measure(hub, lambda: d3hub.load(SMALL))}
    rows["open 10 classes, cached, by branch"] = measure(hub, lambda: d3hub.load(SMALL))
    pinned = str(d3hub.pull(d3hub.parse_address(SMALL)).address)
    rows["open 10 classes, cached, pinned"] = measure(hub, lambda: d3hub.load(pinned))
    rows["info of 1000 classes"] = measure(hub, lambda: d3hub.remote_info(LARGE))
    for wanted in ([500], [3, 999], list(range(0, 1000, 100))):
        name = f"{len(wanted)} of 1000 classes"
        rows[name] = measure(hub, partial(d3hub.read_classes, LARGE, wanted))
        rows[name]["share"] = round(rows[name]["bytes"] / len(large), 4)
    rows["open 1000 classes, cold"] = measure(hub, lambda: d3hub.load(LARGE))
    return {
        "bytes of the pack of 10 classes": len(small),
        "bytes of the pack of 1000 classes": len(large),
        "rows": rows,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "hub.json")
    output = parser.parse_args(arguments).output
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as home:
        # Before huggingface_hub is imported, which reads them once. Telemetry is not ours to count.
        os.environ.update(
            HF_ENDPOINT=hub.url,
            HF_HOME=home,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
        )
        result = run(hub)
    save(output, WHAT, command("hub", arguments), result)
    for name, row in result["rows"].items():
        print(f"{name:36} {row['requests']} requests, {row['bytes']:>9,} bytes  {row['methods']}")
