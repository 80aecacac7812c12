"""Many processes on one cache of decoded images that are killed at random: is every image right?

    python -m benchmarks pressure [-o RESULTS.json] [--minutes 60] [--processes 8] [--seed N]

Two packs share a cache that has room for one and a half of them, so that stores are evicted, made
again, and cold most of the time. A process opens one of the packs and reads all of its images, in
order, at random, in batches of the loader or through a DataLoader with workers; or it verifies the
stores, or removes those that nobody uses, or turns a bit of a stored image. Every image is compared
with what a single process decoded without a cache. Processes are killed (SIGKILL) at random times
and replaced. Faults are: another image, an exception, a process that does not end within three
minutes, and, when all is over, a store that cannot be read or is too large.

Bits are turned only in stores that nobody uses: an image that was checked may be read again later.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.results import RESULTS, command, save
from d3pack.dataset import D3MDataset, list_stores, remove_store, store_in_use, verify_store
from d3pack.errors import UsageError
from d3pack.format import write

WHAT = (__doc__ or "").partition("\n")[0]

IMAGES = 120  # of a pack
PATIENCE = 180  # seconds for one process
NO_ROOM = 9  # exit code
OUTCOMES: dict[int | None, str] = {NO_ROOM: "no room", -signal.SIGKILL: "killed"}
ACTIONS = ("order", "random", "loader", "workers", "verify", "remove", "damage")
WEIGHTS = (4, 4, 4, 2, 1, 1, 1)  # how often each is chosen
FORK = multiprocessing.get_context("fork")


def make(folder: Path) -> None:
    """Write two packs of a tiny backbone, and the images that one process decodes of each."""
    from dataset_packs import tiny_pack
    from tiny_backbones import tiny_dit

    torch.set_num_threads(1)
    made = tiny_pack(tiny_dit(folder / "a.backbone"), images=IMAGES // 3)
    (folder / "b.backbone").symlink_to("a.backbone")
    for name, pack in (("a", made), ("b", replace(made, seed=made.seed + 1))):
        write(pack, folder / f"{name}.d3m")
        with D3MDataset(folder / f"{name}.d3m", device="cpu", cache=None, quiet=True) as dataset:
            torch.save(torch.stack([image for image, _ in dataset]), folder / f"{name}.pt")


def limit(folder: Path) -> int:
    """Return the bytes that the cache may take."""
    return int(1.5 * torch.load(folder / "a.pt").nbytes)


def act(folder: Path, action: str, seed: int) -> None:
    """Do what one process does; what goes wrong is noted beside the packs."""
    torch.set_num_threads(1)
    try:
        chosen = random.Random(seed)
        if action in ("verify", "remove", "damage"):
            _disturb(folder / "cache", action, chosen)
        else:
            _read(folder, chosen.choice("ab"), action, chosen)
    except UsageError as error:
        if "free stores in use" not in str(error):  # the other pack is being read
            raise
        sys.exit(NO_ROOM)
    except BaseException:
        (folder / f"fault-{seed}").write_text(f"{action}\n{traceback.format_exc()}")
        raise


def _read(folder: Path, name: str, action: str, chosen: random.Random) -> None:
    """Read all images of a pack and compare them."""
    right = torch.load(folder / f"{name}.pt")
    with D3MDataset(
        folder / f"{name}.d3m",
        device="cpu",
        cache="disk",
        cache_dir=folder / "cache",
        cache_size=limit(folder),
        quiet=True,
    ) as dataset:
        numbers = list(range(len(dataset)))
        if action == "random":
            chosen.shuffle(numbers)
        if action in ("order", "random"):
            for number in numbers:
                assert torch.equal(dataset[number][0], right[number]), number
            return
        seen: Counter[int] = Counter()
        batches = (
            dataset.loader(16, shuffle=True, seed=chosen.randrange(99))
            if action == "loader"
            else DataLoader(dataset, 16, shuffle=True, num_workers=2, multiprocessing_context=FORK)
        )
        for images, _ in batches:
            same = (right[None] == images[:, None]).flatten(2).all(2)
            assert bool(same.any(1).all()), "an image is not of the pack"
            seen.update(same.int().argmax(1).tolist())
        assert seen == Counter(numbers), "an image came twice or never"


def _disturb(cache: Path, action: str, chosen: random.Random) -> None:
    """Verify, remove or damage the stores that are there; another process may remove them."""
    for entry in list_stores(cache):
        if action == "verify":
            with contextlib.suppress(FileNotFoundError):
                verify_store(entry)
        elif action == "remove":
            remove_store(entry.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                if not store_in_use(entry.path):
                    _turn_a_bit(entry.path / "pixels", chosen)


def _turn_a_bit(pixels: Path, chosen: random.Random) -> None:
    with open(pixels, "r+b") as file:
        place = chosen.randrange(max(1, pixels.stat().st_size))
        file.seek(place)
        byte = file.read(1) or b"\0"
        file.seek(place)
        file.write(bytes([byte[0] ^ 1 << chosen.randrange(8)]))


def press(folder: Path, seconds: float, processes: int, seed: int) -> dict[str, Any]:
    """Keep so many processes at work for so long; return what happened."""
    chosen = random.Random(seed)
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*OUTCOMES.values(), "finished")}
    alive: list[tuple[BaseProcess, str, float, float]] = []
    hung = number = 0
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds or alive:
        for entry in list(alive):
            process, action, started, dies = entry
            if not process.is_alive():
                process.join()
                counts[OUTCOMES.get(process.exitcode, "finished")][action] += 1
            elif now > dies or now > started + PATIENCE:
                hung += now <= dies
                process.kill()
                process.join()
                counts["killed"][action] += 1
            else:
                continue
            alive.remove(entry)
        while len(alive) < processes and now < began + seconds:
            number += 1
            (action,) = chosen.choices(ACTIONS, WEIGHTS)
            # half of them are killed, most of these early
            dies = now + chosen.expovariate(2.0) if chosen.random() < 0.5 else float("inf")
            task = (folder, action, seed * 10**9 + number)
            process = FORK.Process(target=act, args=task)
            process.start()
            alive.append((process, action, now, dies))
        time.sleep(0.01)
    faults = [path.read_text() for path in sorted(folder.glob("fault-*"))]
    return {name: dict(sorted(count.items())) for name, count in counts.items()} | {
        "faults": faults + ["a process did not end"] * hung
    }


def after(folder: Path) -> None:
    """Read both packs once more, from what is left of the cache."""
    for name in "ab":
        _read(folder, name, "order", random.Random(0))
    taken = sum(entry.size for entry in list_stores(folder / "cache"))
    assert taken <= limit(folder), f"the cache takes {taken} bytes"


def run(function: Any, *arguments: Any) -> None:
    """Run a function in a process of its own: one that has computed cannot be forked well."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def main(argv: list[str] | None = None) -> None:
    """Press, and write what happened; exit with 1 if there were faults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pressure", description=WHAT)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "pressure.json")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    import_module("diffusers").DiTTransformer2DModel  # noqa: B018 - here, so that forks have it
    folder = Path(tempfile.mkdtemp())
    try:
        run(make, folder)
        figures = press(folder, 60 * args.minutes, args.processes, args.seed)
        run(after, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures |= {"minutes": args.minutes, "processes": args.processes, "images": 2 * IMAGES}
    save(args.output, WHAT, command("pressure", argv or []), figures)
    print({k: v for k, v in figures.items() if k != "faults"}, *figures["faults"], sep="\n")
    sys.exit(bool(figures["faults"]))
