"""Do our students agree with the literature? ConvNet-3 on random real images, without augmentation.

    python -m benchmarks reference --real cifar10 --work work/reference --per-class 1,10 --seeds 5

The protocol is that of dataset condensation (`dc`). Published for CIFAR-10 (arXiv
2006.05929, table 1, "random"): 14.4 ± 2.0, 26.0 ± 1.2 and 43.4 ± 1.0 % at 1, 10 and 50 images a
class. Finished students are kept in --work; the JSON holds all that are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import RESULTS, command, load, save
from d3pack.evaluate import PROTOCOLS, Bench
from d3pack.evaluate.baselines import random_entry
from d3pack.sources import open_source
from d3pack.students.real import RealImages, common_size
from d3pack.system import Events

WHAT = "ConvNet-3 on random real images of CIFAR-10, beside published accuracies"
PUBLISHED = {1: (0.144, 0.020), 10: (0.260, 0.012), 50: (0.434, 0.010)}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--real", type=Path, required=True, help="CIFAR-10 with train/ and test/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--per-class", default="1,10,50")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(arguments)

    source = open_source(args.real, split="train")
    test_source = open_source(args.real, split="test")
    size = common_size(test_source)
    train = RealImages(source, source.classes, size, "training")
    test = RealImages(test_source, source.classes, size, "test")
    protocol = PROTOCOLS["dc"]
    rows = load("reference").get("rows", {})
    for per_class in map(int, args.per_class.split(",")):
        images = per_class * len(source.classes)
        events = Events([lambda event: print(event["text"]) if "text" in event else None])
        bench = Bench(train, test, images, protocol, args.work, events=events)
        result = bench.run(random_entry(train, per_class), args.seeds)
        mean, spread = PUBLISHED[per_class]
        rows[str(per_class)] = {
            "published": {"mean": mean, "std": spread},
            "here": {"mean": result.last.mean, "std": result.last.std},
            "accuracies": [history.last for history in result.histories],
            "updates": result.histories[0].updates,
            "agrees": abs(result.last.mean - mean) <= spread,
        }
        figures = {"protocol": protocol.source, "target": "CIFAR-10", "rows": rows}
        save(RESULTS / "reference.json", WHAT, command("reference", arguments), figures)
        print(
            f"{per_class} a class: {100 * result.last.mean:.1f} ± {100 * result.last.std:.1f} %,"
            f" published {100 * mean:.1f} ± {100 * spread:.1f} %"
        )
