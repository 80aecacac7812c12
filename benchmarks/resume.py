"""Which loaders hand out every sample exactly once when a training is killed and resumed.

    python -m benchmarks resume [-o RESULTS.json] [--only NAME ...] [--seed N]

A training on 2 ranks with 2 workers each is killed at a random batch, resumed with the same number,
fewer or more of both, killed again, and resumed to the end of the epoch; and it is killed after the
last batch of an epoch, and resumed in the next one. 144 samples, in batches of 4 a rank: all ranks
and workers have equal shares. Ranks are processes with gloo; a state is saved on each rank after a
batch. A rank loads its own state, one that is new loads that of the first. Peers that are not
installed are left out, and named.

`exact`: each sample once, in both cases; `2 twice, 1 never`: samples of an epoch of which that is
true; `next epoch: ...`: only there; `refuses`: it raises an error; `hangs`: a minute of nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.loader_peers import streaming
from benchmarks.results import RESULTS, command, save
from benchmarks.resume_peers import BATCH, IMAGES, PEERS, Loader, pack
from d3pack.system import markdown_table

WHAT = (__doc__ or "").partition("\n")[0]

RANKS = WORKERS = 2
COUNTS = {"same": 2, "fewer": 1, "more": 3}
PATIENCE = 60  # seconds for a part of a training


class FailedError(Exception):
    """A part of a training did not end as it should."""


def rank(
    peer: Loader, out: Path, number: int, world: int, workers: int, state: Any, steps: int
) -> None:
    """What a process does: `steps` batches from a state on (0: to the end), save, and be killed."""
    os.environ.update(
        {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
        | {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{out}/meet", rank=number, world_size=world
        )
        loader = peer.open(number, world, workers)
        if state is not None:
            loader.load_state_dict(state)
        batches: list[list[int]] = []
        saved = None
        for _ in range(2):  # a state of the end of an epoch may begin with an empty one
            for batch in loader:
                batches.append(peer.ids(batch))
                if len(batches) == steps:
                    saved = loader.state_dict()
                    break
            if batches:
                break
        result: Any = (batches, saved)
    except Exception as error:
        last = str(error).strip().splitlines()[-1:]  # of a worker's traceback
        result = ": ".join([type(error).__name__, *last])
    (out / f"{number}.new").write_bytes(pickle.dumps(result))
    (out / f"{number}.new").rename(out / f"{number}.done")
    if isinstance(result, tuple):
        with contextlib.suppress(Exception):
            dist.barrier()  # nobody is killed while another still needs it
    os.kill(os.getpid(), signal.SIGKILL)


def part(
    peer: Loader, world: int, workers: int, states: list[Any] | None, steps: int
) -> tuple[list[int], list[Any]]:
    """Run all ranks of a part of a training; return the samples and the state of each rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        load = [states[number if number < len(states) else 0] if states else None
                for number in range(world)]  # fmt: skip
        ranks = [
            context.Process(target=rank, args=(peer, out, n, world, workers, load[n], steps))
            for n in range(world)
        ]
        for process in ranks:
            process.start()
        until = time.monotonic() + PATIENCE
        while any(process.is_alive() for process in ranks) and time.monotonic() < until:
            time.sleep(0.02)
        for process in ranks:
            process.kill()
            process.join()
        done = [out / f"{number}.done" for number in range(world)]
        if not all(path.exists() for path in done):
            raise FailedError("hangs")
        results = [pickle.loads(path.read_bytes()) for path in done]
    for result in results:
        if isinstance(result, str):
            raise FailedError(f"refuses: {result}")
    samples = [number for batches, _ in results for ids in batches for number in ids]
    return samples, [state for _, state in results]


def verdict(samples: Sequence[int]) -> str:
    """Say how the samples of an epoch differ from each of them once."""
    counts = Counter(samples)
    twice = sum(count - 1 for count in counts.values())
    never = IMAGES - len(counts)
    words = ([f"{twice} twice"] if twice else []) + ([f"{never} never"] if never else [])
    return ", ".join(words) or "exact"


def resumed(peer: Loader, start: Any, end: Any, world: int, workers: int, second: int) -> str:
    """Resume a training that was killed within an epoch, then one that was killed after it."""
    first, states = start
    try:
        samples, states = part(peer, world, workers, states, second)
        within = verdict(first + samples + part(peer, world, workers, states, 0)[0])
    except FailedError as error:
        return str(error)
    try:
        after = verdict(part(peer, world, workers, end[1], 0)[0])
    except FailedError as error:
        after = str(error)
    return within if after == "exact" or within != "exact" else f"next epoch: {after}"


def measure(peer: Loader, random_: random.Random) -> dict[str, Any]:
    """Return the verdict of each cell."""
    steps = IMAGES // BATCH // RANKS
    kill = random_.randrange(2, steps // 2)
    second = random_.randrange(1, (steps - kill) * RANKS // max(COUNTS.values()))
    start = part(peer, RANKS, WORKERS, None, kill)
    end = part(peer, RANKS, WORKERS, None, steps)
    plain = verdict(end[0])
    cells = {}
    for (ranks, world), (worker, workers) in product(COUNTS.items(), COUNTS.items()):
        cell = f"{ranks} ranks, {worker} workers"
        cells[cell] = resumed(peer, start, end, world, workers, second)
        print(f"  {cell}: {cells[cell]}", flush=True)
    return {"killed at": [kill, second], "without a kill": plain, "cells": cells}


def table(figures: dict[str, Any]) -> str:
    """Return the exact cells of each loader, and what the others do, as Markdown."""
    rows = []
    for name, row in figures["loaders"].items():
        words = [row["cells"][f"{ranks} ranks, same workers"] for ranks in COUNTS]
        words += [row["cells"][f"same ranks, {workers} workers"] for workers in ("fewer", "more")]
        words = [word.partition("refuses")[0] + "refuses" * ("refuses" in word) for word in words]
        exact = sum(cell == "exact" for cell in row["cells"].values())
        rows.append([name, *words, f"{exact} of {len(row['cells'])}"])
    head = ["loader", "same", "fewer ranks", "more ranks", "fewer workers", "more workers", "exact"]
    return markdown_table(head, rows)


def main(argv: list[str] | None = None) -> None:
    """Measure every loader, or some."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks resume", description=WHAT)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "resume.json")
    parser.add_argument("--only", nargs="+", help="names that contain one of these words")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    loaders: dict[str, Any] = {}
    absent: dict[str, str] = {}
    try:
        streaming()  # first: it mends a torchvision of another torch
        pack(folder)
        for kind in PEERS:
            if args.only and not any(word in kind.name for word in args.only):
                continue
            print(kind.name, flush=True)
            peer = kind(folder)
            try:
                peer.write()
                loaders[peer.name] = measure(peer, random.Random(args.seed))
            except (ImportError, AttributeError, FailedError) as error:
                absent[peer.name] = str(error)
                print(f"  left out: {error}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {"loaders": loaders, "left out": absent, "samples": IMAGES, "batch": BATCH}
    save(args.output, WHAT, command("resume", argv or []), figures)
    print(table(figures))
