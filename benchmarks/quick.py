"""Where the time of a `quick` student goes on this machine, and why the preset is what it is.

    python benchmarks/quick.py --threads 2 --full
    python benchmarks/quick.py --choose cifar10 --threads 1

Times an update of the preset as it is, and with each of its savings taken away: bfloat16 products,
chunks that stay in the processor's cache, ReLU and pooling in one. `--full` also trains one whole
student on 10 classes x 10 images with 10,000 test images. Wall and processor seconds: on a busy
machine only the latter mean something. `--choose` compares ways to spend about the same time, on
random real images of the training folders, examined on 500 other training images of each class:
no test image and no pack has a part in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d3pack.evaluate import presets, students, training
from d3pack.evaluate.presets import SGD, AdamW, Exams, Preset, Updates
from d3pack.evaluate.real import RealImages, common_size
from d3pack.evaluate.workdir import write_json
from d3pack.sources import open_source

OUT = Path(__file__).parent / "results" / "quick.json"
CLASSES, PER_CLASS, SIDE = 10, 10, 32
HELD_BACK = 500  # images of each class, for --choose


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
    return pixels, torch.arange(count) % CLASSES


@contextmanager
def changed(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    yield
    setattr(place, name, before)


def clocked(preset: Preset, tests: int) -> dict[str, float]:
    """Seconds of one training, by the wall and by the processor."""
    content, truth = images(CLASSES * PER_CLASS), images(tests)
    wall, cpu = time.perf_counter(), time.process_time()
    training.train_student(*content, *truth, preset, 0, classes=CLASSES)
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - cpu}


def per_update(preset: Preset, rounds: int) -> dict[str, float]:
    """Best of some rounds: seconds an update, start and test taken off."""
    brief = replace(preset, length=Updates(1), exams=Exams())
    longer = replace(preset, length=Updates(6), exams=Exams())
    clocked(brief, 1)
    best: dict[str, float] = {}
    for _ in range(rounds):
        one, six = clocked(brief, 1), clocked(longer, 1)
        for kind in one:
            found = (six[kind] - one[kind]) / 5
            best[kind] = min(best.get(kind, found), found)
    return {kind: round(value, 4) for kind, value in best.items()}


def variants() -> dict[str, Preset]:
    quick = presets.QUICK
    named: dict[str, dict[str, Any]] = {
        "as it is": {},
        "rate 5e-4": {"optimizer": AdamW(lr=5e-4)},
        "rate 2e-3": {"optimizer": AdamW(lr=2e-3)},
        "SGD 0.01": {"optimizer": SGD()},
        "SGD 0.05": {"optimizer": SGD(lr=0.05)},
        "600 updates of 32": {"length": Updates(600), "batch": ((presets.ANY, 32),)},
        "150 updates of 128": {"length": Updates(150), "batch": ((presets.ANY, 128),)},
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
            for name, preset in variants().items():
                history = training.train_student(
                    everything.images[picked],
                    everything.labels[picked],
                    everything.images[truth],
                    everything.labels[truth],
                    preset,
                    seed,
                    classes=len(source.classes),
                )
                row = table.setdefault(name, {}).setdefault(str(count), [])
                row.append(round(history.last, 4))
                print(f"seed {seed}, {count} a class, {name}: {row[-1]:.1%}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--choose", metavar="REAL", help="folders of real images, with train/")
    parser.add_argument("--per-class", default="10,50", help="for --choose")
    parser.add_argument("--seeds", type=int, default=2, help="for --choose")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.choose:
        counts = tuple(map(int, args.per_class.split(",")))
        save({"choice": choose(args.choose, counts, args.seeds)})
        return
    quick = presets.QUICK
    plain = replace(quick, precision="float32")

    def two_steps() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(2))

    found: dict[str, Any] = {"quick": per_update(quick, args.rounds)}
    found["without bfloat16"] = per_update(plain, args.rounds)
    with changed(training, "_CPU_CHUNK", 1 << 20):
        found["without chunks"] = per_update(quick, args.rounds)
    with changed(students, "ReluPool", two_steps):
        found["without the fused pooling"] = per_update(quick, args.rounds)
        with changed(training, "_CPU_CHUNK", 1 << 20):
            found["without all three"] = per_update(plain, args.rounds)
    if args.full:
        full = clocked(quick, 10_000)
        found["one whole student"] = {kind: round(value, 1) for kind, value in full.items()}
    save({f"threads {args.threads}": found})
    print(json.dumps(found, indent=1))


def save(found: dict[str, Any]) -> None:
    value = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    value |= {"batch": 64, "updates": presets.QUICK.units(0), "torch": torch.__version__}
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, value | found)


if __name__ == "__main__":
    main()
