"""The three methods on one source: student accuracy, images a second, likeness to real images.

    d3pack encode cifar10 --method classcond --time-budget 30m --decode-seconds 33 --ipc 50 \\
        --probes 4 --teacher-samples 80000 -o a.d3m
    d3pack encode cifar10 --method minimax --backbone a.backbone --ipc 50 --probes 4 \\
        --teacher-samples 80000 --sampler-steps 18 --guidance 2.5 --set ema=0.999 \\
        --set train_steps=4000 -o b.d3m    # the sampler that classcond has chosen
    python -m benchmarks methods --real cifar10 --work work/methods --images 50 \\
        classcond=a.d3m minimax=b.d3m:a.backbone d3m=examples/cifar10.d3m

`--real` has train/ and test/ with one folder a class. Each pack may be followed by the directory of
its backbone, as name=pack.d3m:backbone/; of each the first `--images` of a class are looked at.
Rows go into `results/methods.json` one by one. Precision, recall, density and coverage
(arXiv 2002.09797) are taken class by class in the features of the teacher that every method asks,
against as many real images of the class as the pack has, k = 5.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import RESULTS, command, load, save
from d3pack.decode import Decoder, local_backbone
from d3pack.evaluate import PROTOCOLS, Bench
from d3pack.evaluate.baselines import pack_entry
from d3pack.format import Pack, read
from d3pack.sources import open_source
from d3pack.students import fit
from d3pack.students.real import RealImages, common_size
from d3pack.system import Events, Journal
from d3pack.teachers import Teacher, batched, teacher_cache, teacher_config, train_teacher

WHAT = "The three methods on one source: accuracy, images a second, likeness to real images"
NEAREST = 5


def manifold(real: Tensor, made: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of features, by balls around the k-th neighbour."""
    k = min(NEAREST, len(real) - 1, len(made) - 1)

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    across = torch.cdist(real, made)
    inside = across <= radii(real)[:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((across <= radii(made)[None]).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float((across.min(1).values <= radii(real)).double().mean()),
    }


def likeness(teacher: Teacher, train: RealImages, images: Tensor) -> dict[str, float]:
    """Means over classes, and the share of images that the teacher gives to their class."""
    found: dict[str, list[float]] = {}
    logits, _ = batched(teacher, images)
    count = len(images) // len(train.order)
    answers = logits.argmax(1).reshape(-1, count)
    found["right"] = (answers == torch.arange(len(answers))[:, None]).double().mean(1).tolist()
    for c in range(len(train.order)):
        places = range(min(4 * count, train.counts[c]))
        drawn = [image for i in places if (image := train.get(c, i)) is not None]
        real = torch.stack(drawn[:count])
        pair = teacher.features(torch.cat([real, images[c * count : (c + 1) * count]])).double()
        for name, value in manifold(pair[: len(real)], pair[len(real) :]).items():
            found.setdefault(name, []).append(value)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def speed(pack: Pack, folder: Path | None, rounds: int = 2) -> dict[str, float]:
    """Images a second of the exact decoder, the better of the rounds."""
    best = {"images_per_second": 0.0, "images_per_cpu_second": 0.0}
    best["threads"] = torch.get_num_threads()
    with Decoder(pack, path=folder) as decoder:
        count = 4 * decoder.group * torch.get_num_threads()
        numbers = [i % len(pack) for i in range(count)]
        decoder.images(numbers[: decoder.group])
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            decoder.images(numbers)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best["images_per_second"] = max(best["images_per_second"], round(count / wall, 2))
            best["images_per_cpu_second"] = max(
                best["images_per_cpu_second"], round(count / cpu, 2)
            )
    return best


def open_teacher(train: RealImages, samples: int, work: Path) -> Teacher:
    """The one that the methods asked, remembered from there."""
    journal = Journal(work, {"samples": samples})
    try:
        lesson = teacher_config(train.size, samples, 0)
        return train_teacher(
            train.source, lesson, journal, Events([]), cache=teacher_cache(), device="cpu"
        )
    finally:
        journal.close()


def row(name: str, pack: Pack, folder: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one pack."""
    train_source = open_source(args.real, split="train")
    test_source = open_source(args.real, split="test")
    size = common_size(test_source)
    train = RealImages(train_source, pack.classes, size, "training")
    test = RealImages(test_source, pack.classes, size, "test")
    events = Events([lambda event: print(event["text"]) if "text" in event else None])
    protocol = PROTOCOLS["quick"]
    bench = Bench(train, test, len(pack), protocol, args.work, backbone=folder, events=events)
    total = pack.ledger().total
    result = bench.run(pack_entry(bench, name, name, pack, total), args.seeds)
    teacher = open_teacher(train, args.teacher_samples, args.work / f"teacher-{name}")
    images = fit(bench.decode(pack).images, size)  # as a student sees them
    recipe = pack.recipe
    return {
        "method": pack.provenance["method"],
        "root": pack.root,
        "images_per_class": pack.images_per_class,
        "bytes": total,
        "adapter_bytes": pack.ledger().sections.get("adapter", 0),
        "backbone_bytes": recipe.backbone.nbytes,
        "sampler": [recipe.sampler, len(recipe.sigmas) - 1, recipe.guidance],
        "provenance": json.loads(json.dumps(pack.provenance, default=dict)),
        "student": result.to_json(),
        "likeness": likeness(teacher, train, images),
        "speed": speed(pack, folder),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packs", nargs="+", metavar="name=pack.d3m[:backbone/]")
    parser.add_argument("--real", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50, help="of a class, the first of each pack")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-samples", type=int, default=80_000)
    parser.add_argument("--speed", action="store_true", help="measure that again, and no more")
    args = parser.parse_args(arguments)
    for given in args.packs:
        name, _, place = given.partition("=")
        path, _, folder = place.partition(":")
        pack = read(path).first(args.images)
        home = Path(folder) if folder else local_backbone(path, pack)
        figures = {"rows": {}, **load("methods")}
        if args.speed:
            figures["rows"][name]["speed"] = speed(pack, home)
            print(name, figures["rows"][name]["speed"])
        else:
            result = row(name, pack, home, args)
            figures["rows"][name] = result
            figures |= {"target": Path(args.real).name, "protocol": "quick"}
            last, likeness_ = result["student"]["last"], result["likeness"]
            print(f"{name}: {100 * last['mean']:.1f} ± {100 * last['std']:.1f} %, {likeness_}")
        save(RESULTS / "methods.json", WHAT, command("methods", arguments), figures)
