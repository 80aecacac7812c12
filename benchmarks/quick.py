"""Where the time of a `quick` student goes on this machine.

    python benchmarks/quick.py --threads 2 --full

Times an update of the preset as it is, and with each of its savings taken away: bfloat16 products,
chunks that stay in the processor's cache, ReLU and pooling in one. `--full` also trains one whole
student on 10 classes x 10 images with 10,000 test images. Wall and processor seconds: on a busy
machine only the latter mean something.
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
from d3pack.evaluate.presets import Exams, Preset, Updates
from d3pack.evaluate.workdir import write_json

OUT = Path(__file__).parent / "results" / "quick.json"
CLASSES, PER_CLASS, SIDE = 10, 10, 32


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
    value = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    value |= {"batch": 64, "updates": quick.units(0), "torch": torch.__version__}
    value[f"threads {args.threads}"] = found
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, value)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
