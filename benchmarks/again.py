"""How far encoding again moves a pack: other seeds, with teachers that were trained longer or less.

    python -m benchmarks again --real REAL --work WORK [--ipc 50] [--encodings 3]
                               [--teacher-samples 250000 ...] [-o RESULTS.json]

Encodes the training images of REAL with the seeds 0, 1, 2, ..., each time from the teacher on and
with derived seeds of images, and tests one `quick` student of each pack on the test images of REAL
(to choose settings, name images that no result is made on). The deviation is that between
encodings, so it holds the student's own. Packs and students are kept in WORK, and not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import d3pack
from benchmarks.results import RESULTS, command, save
from d3pack.encode import EncodeSettings, encode
from d3pack.evaluate import EvalSettings, evaluate
from d3pack.sources import open_source
from d3pack.students import Protocol
from d3pack.teachers import SAMPLES

WHAT = (__doc__ or "").partition("\n")[0]


def accuracy_of(
    real: Path, work: Path, name: str, settings: EncodeSettings, protocol: Protocol | None = None
) -> tuple[float, int]:
    """Return the accuracy of a student of a pack, and the bytes of the pack; make what is missing.

    Args:
        real: images with a train and a test part.
        work: folder of the packs and their students.
        name: of the pack there.
        settings: how it is encoded.
        protocol: how the student is trained; None: `quick`.
    """
    pack = work / f"{name}.d3m"
    if not pack.exists():
        encode(open_source(real, split="train"), pack, settings)
    own = EvalSettings(baselines=("none",), seeds=1, allow_long=True, backbone=settings.backbone)
    result = evaluate(pack, real, own, work=work / f"{name}.test", protocol=protocol).get("pack")
    assert result is not None
    return result.last.mean, d3pack.read(pack).ledger().total


def measure(
    real: Path,
    work: Path,
    settings: EncodeSettings,
    lengths: Sequence[int],
    encodings: int,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Return accuracy and bytes of every encoding, with mean and deviation for each length.

    Args:
        real: images with a train and a test part.
        work: folder of the packs and their students.
        settings: how packs are encoded, but for the seed and the length of the teacher's training.
        lengths: images that the training of the teacher sees.
        encodings: seeds for each length.
        protocol: how students are trained; None: `quick`.
    """
    figures: dict[str, Any] = {}
    for samples in lengths:
        runs = [
            accuracy_of(
                real,
                work,
                f"{samples}-{seed}",
                replace(settings, teacher_samples=samples, seed=seed),
                protocol,
            )
            for seed in range(encodings)
        ]
        accuracies = [round(accuracy, 4) for accuracy, _ in runs]
        figures[f"{samples}"] = {
            "accuracies": accuracies,
            "mean": round(fmean(accuracies), 4),
            "deviation": round(stdev(accuracies), 4),
            "bytes": [nbytes for _, nbytes in runs],
        }
    return figures


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks again", description=WHAT)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ipc", type=int, default=50)
    parser.add_argument("--encodings", type=int, default=3)
    parser.add_argument("--teacher-samples", type=int, nargs="+", default=[SAMPLES])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "again.json")
    args = parser.parse_args(argv)
    settings = EncodeSettings(images_per_class=args.ipc, candidates=1)
    args.work.mkdir(parents=True, exist_ok=True)
    figures = measure(args.real, args.work, settings, args.teacher_samples, args.encodings)
    test = open_source(args.real, split="test")
    facts = {"images_per_class": args.ipc, "test_images": sum(test.counts), "by_samples": figures}
    save(args.output, WHAT, command("again", argv or []), facts)
    for samples, row in figures.items():
        print(f"{samples}: {100 * row['mean']:.2f} ± {100 * row['deviation']:.2f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
