"""Where the time of a `quick` student goes on this machine, and why the protocol is what it is.

    python -m benchmarks quick --threads 2 --full
    python -m benchmarks quick --choose cifar10 --threads 1

Times an update of the protocol as it is, and without each of its savings: bfloat16 products, chunks
that stay in the processor's cache, ReLU and pooling in one. `--full` also trains one whole
student on 10 classes x 10 images with 10,000 test images. Wall and processor seconds: on a busy
machine only the latter mean something. `--choose` compares ways to spend about the same time, on
random real images of the training folders, examined on 500 other training images of each class:
no test image and no pack has a part in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.results import RESULTS, command, load, save
from d3pack.sources import open_source
from d3pack.students import LabelledImages, networks, training
from d3pack.students.protocols import ANY, QUICK, SGD, AdamW, Intervals, Protocol, Updates
from d3pack.students.real import RealImages, common_size

WHAT = "Seconds of a `quick` student by part, and accuracy of protocols that take as long"
CLASSES, PER_CLASS, SIDE = 10, 10, 32
HELD_BACK = 500  # images of each class, for --choose


def images(count: int) -> LabelledImages:
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(count) % CLASSES)


@contextmanager
def changed(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    yield
    setattr(place, name, before)


def clocked(protocol: Protocol, tests: int) -> dict[str, float]:
    """Seconds of one training, by the wall and by the processor."""
    train, test = images(CLASSES * PER_CLASS), images(tests)
    wall, cpu = time.perf_counter(), time.process_time()
    training.train_student(train, test, protocol, 0, classes=CLASSES)
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - cpu}


def per_update(protocol: Protocol, rounds: int) -> dict[str, float]:
    """Best of some rounds: seconds an update, start and test taken off."""
    brief = replace(protocol, length=Updates(1), tests=Intervals())
    longer = replace(protocol, length=Updates(6), tests=Intervals())
    clocked(brief, 1)
    best: dict[str, float] = {}
    for _ in range(rounds):
        one, six = clocked(brief, 1), clocked(longer, 1)
        for kind in one:
            found = (six[kind] - one[kind]) / 5
            best[kind] = min(best.get(kind, found), found)
    return {kind: round(value, 4) for kind, value in best.items()}


def variants() -> dict[str, Protocol]:
    quick = QUICK
    named: dict[str, dict[str, Any]] = {
        "as it is": {},
        "rate 5e-4": {"optimizer": AdamW(lr=5e-4)},
        "rate 2e-3": {"optimizer": AdamW(lr=2e-3)},
        "SGD 0.01": {"optimizer": SGD()},
        "SGD 0.05": {"optimizer": SGD(lr=0.05)},
        "600 updates of 32": {"length": Updates(600), "batch": ((ANY, 32),)},
        "150 updates of 128": {"length": Updates(150), "batch": ((ANY, 128),)},
    }
    return {name: replace(quick, **changes) for name, changes in named.items()}


def choose(real: str, per_class: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Accuracy of every variant, by images of each class: a list with one entry a seed."""
    source = open_source(real, split="train")
    images = RealImages(source, source.classes, common_size(source), "training")
    everything = images.all()
    exam = torch.zeros(len(everything.labels), dtype=torch.bool)
    for label in range(len(source.classes)):
        exam[torch.nonzero(everything.labels == label)[-HELD_BACK:, 0]] = True
    rest, truth = torch.nonzero(~exam)[:, 0], torch.nonzero(exam)[:, 0]
    table: dict[str, Any] = {}
    for seed in range(seeds):
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        for count in per_class:
            rows = [
                drawn[everything.labels[drawn] == c][:count] for c in range(len(source.classes))
            ]
            picked = torch.cat(rows)
            for name, protocol in variants().items():
                history = training.train_student(
                    LabelledImages(everything.images[picked], everything.labels[picked]),
                    LabelledImages(everything.images[truth], everything.labels[truth]),
                    protocol,
                    seed,
                    classes=len(source.classes),
                )
                row = table.setdefault(name, {}).setdefault(str(count), [])
                row.append(round(history.last, 4))
                print(f"seed {seed}, {count} a class, {name}: {row[-1]:.1%}", flush=True)
    return table


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--choose", metavar="REAL", help="folders of real images, with train/")
    parser.add_argument("--per-class", default="10,50", help="for --choose")
    parser.add_argument("--seeds", type=int, default=2, help="for --choose")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.choose:
        counts = tuple(map(int, args.per_class.split(",")))
        keep({"choice": choose(args.choose, counts, args.seeds)}, arguments)
        return
    quick = QUICK
    plain = replace(quick, precision="float32")

    def two_steps() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(2))

    found: dict[str, Any] = {"quick": per_update(quick, args.rounds)}
    found["without bfloat16"] = per_update(plain, args.rounds)
    with changed(training, "_CPU_CHUNK", 1 << 20):
        found["without chunks"] = per_update(quick, args.rounds)
    with changed(networks, "ReluPool", two_steps):
        found["without the fused pooling"] = per_update(quick, args.rounds)
        with changed(training, "_CPU_CHUNK", 1 << 20):
            found["without all three"] = per_update(plain, args.rounds)
    if args.full:
        full = clocked(quick, 10_000)
        found["one whole student"] = {kind: round(value, 1) for kind, value in full.items()}
    keep({f"threads {args.threads}": found}, arguments)
    print(json.dumps(found, indent=1))


def keep(found: dict[str, Any], arguments: Sequence[str]) -> None:
    """Add figures to the committed ones."""
    figures = {**load("quick"), "batch": 64, "updates": QUICK.units(0), **found}
    save(RESULTS / "quick.json", WHAT, command("quick", arguments), figures)
