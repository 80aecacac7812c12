"""Do our students agree with the literature? ConvNet-3 on random real images, without augmentation.

    python benchmarks/reference.py --real cifar10 --work work/reference --per-class 1,10 --seeds 5

The protocol is that of dataset condensation (preset `dc`). Published for CIFAR-10 (arXiv
2006.05929, table 1, "random"): 14.4 ± 2.0, 26.0 ± 1.2 and 43.4 ± 1.0 % at 1, 10 and 50 images a
class. Finished students are kept in --work; the JSON holds all that are there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from d3pack.evaluate import baselines, presets
from d3pack.evaluate.evaluation import EvalOptions, make_bench
from d3pack.evaluate.real import RealImages, common_size
from d3pack.evaluate.workdir import Workdir, write_json
from d3pack.sources import open_source

OUT = Path(__file__).parent / "results" / "reference.json"
PUBLISHED = {1: (0.144, 0.020), 10: (0.260, 0.012), 50: (0.434, 0.010)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--real", type=Path, required=True, help="CIFAR-10 with train/ and test/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--per-class", default="1,10,50")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    source = open_source(args.real, split="train")
    exam = open_source(args.real, split="test")
    size = common_size(exam)
    train = RealImages(source, source.classes, size, "training")
    test = RealImages(exam, source.classes, size, "test")
    options = EvalOptions(presets.DC)
    rows = json.loads(OUT.read_text("utf-8"))["rows"] if OUT.exists() else {}
    for per_class in map(int, args.per_class.split(",")):
        images = per_class * len(source.classes)
        bench = make_bench(
            source.classes, images, train, test, Workdir(args.work), options, report=print
        )
        result = bench.run(baselines.random_images(train, per_class), args.seeds)
        mean, spread = PUBLISHED[per_class]
        rows[str(per_class)] = {
            "published": {"mean": mean, "std": spread},
            "here": {"mean": result.last.mean, "std": result.last.std},
            "accuracies": [history.last for history in result.histories],
            "updates": result.histories[0].updates,
            "agrees": abs(result.last.mean - mean) <= 0.02,
        }
        OUT.parent.mkdir(exist_ok=True)
        write_json(
            OUT,
            {"preset": presets.DC.source, "target": "CIFAR-10", "torch": torch.__version__,
             "rows": rows},
        )  # fmt: skip
        print(
            f"{per_class} a class: {100 * result.last.mean:.1f} ± {100 * result.last.std:.1f} %,"
            f" published {100 * mean:.1f} ± {100 * spread:.1f} %"
        )


if __name__ == "__main__":
    main()
