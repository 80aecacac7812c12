"""Loss curves of prompts with three rules for what the gradients of a group agree on.

    python -m benchmarks encode_shared cifar10 --work work/encode

`agreed`, the rule of `encode`: a class follows the shared part of a step where it leads downhill by
the class's own gradient. `always`: every class follows it, the rule of before. `never`: each class
follows its own gradient alone. Teacher, collages, classes and the examination are those of
`encode`, whose `--work` may be used again; all classes are examined, as the pack holds them at that
moment, by the loss on fixed triples of collages of test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encode_peer import start_vector
from benchmarks.encode_sides import Array, Sides, Terms, moments, report, with_start
from benchmarks.results import RESULTS, command, save
from d3pack.encode.methods.d3m.curvature import OWN, SHARED, Curvature
from d3pack.encode.methods.d3m.method import round_trip

WHAT = (__doc__ or "").partition("\n")[0]
EVERY = 2  # of the moments of `encode`, to examine all classes in as much time


class Always(Curvature):
    """Every row follows what all rows agree on."""

    def steps(self, gradients: Array, each: int) -> Array:
        rows, k, _ = gradients.shape
        mean = gradients.mean(0, keepdims=True)
        shared = self._damped(mean, SHARED / (each * rows))
        steps: Array = (self._damped(gradients - mean, OWN / each) + shared) / k
        return steps


class Never(Curvature):
    """Every row follows its own gradient alone."""

    def steps(self, gradients: Array, each: int) -> Array:
        steps: Array = self._damped(gradients, OWN / each) / gradients.shape[1]
        return steps


RULES: dict[str, type[Curvature]] = {"agreed": Curvature, "always": Always, "never": Never}


def curve_of(sides: Sides, rule: str, c: int) -> list[list[float]]:
    """Return samples and losses of a class, from its name on."""
    stored = sides.journal.load(f"shared/{rule}/{c:06d}")
    assert stored is not None
    start = start_vector(sides.backbone, sides.source.classes[c])
    trace = with_start(stored[0], round_trip(sides.codec)(start[None]))
    samples = trace["samples"].tolist()
    places = moments(samples)
    places = sorted({*places[::EVERY], places[-1]})
    key = f"shared/losses/{rule}/{c:06d}"
    known = sides.journal.load(key)
    if known is None:
        exam = sides.exam(c)
        known = ({"loss": np.array([exam.loss(trace["vectors"][place]) for place in places])}, {})
        sides.journal.save(key, *known)
    losses = known[0]["loss"].tolist()
    return [[samples[place], round(loss, 6)] for place, loss in zip(places, losses, strict=True)]


def measured(sides: Sides, rule: str) -> dict[str, Any]:
    """Return the curves of all classes with a rule, and what they come to."""
    count = len(sides.source.classes)
    if f"shared/{rule}" not in sides.journal:
        latents = [sides.collages(c)[0]["latents"] for c in range(count)]
        watch = sides.inverted(latents, RULES[rule])
        for c in range(count):
            sides.journal.save(f"shared/{rule}/{c:06d}", watch.trace(c), {})
        sides.journal.record(f"shared/{rule}", int(watch.rows[-1]["samples"].sum()))
    curves = {name: curve_of(sides, rule, c) for c, name in enumerate(sides.source.classes)}
    gains = [curve[0][1] - curve[-1][1] for curve in curves.values()]
    figures = {
        "samples": sides.journal[f"shared/{rule}"],
        "start_loss": round(float(np.mean([curve[0][1] for curve in curves.values()])), 6),
        "loss": round(float(np.mean([curve[-1][1] for curve in curves.values()])), 6),
        "least_gain": round(min(gains), 6),
        "curves": curves,
    }
    report(f"{rule}: {figures['start_loss']} to {figures['loss']}, {figures['samples']} samples")
    return figures


def main(arguments: Sequence[str]) -> None:
    """Learn the prompts of a source by each rule, and examine them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks encode_shared",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    terms = Terms()
    parser.add_argument("source", type=Path, help="real images: train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--backbone", default=terms.backbone)
    parser.add_argument("--classes", type=int, default=terms.classes)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "encode_shared.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    terms = Terms(backbone=args.backbone, classes=args.classes)
    figures = compared(args.source, terms, args.work / "first")
    save(args.output, WHAT, command("encode_shared", arguments), figures)


def compared(place: Path, terms: Terms, work: Path) -> dict[str, Any]:
    """Return the figures of all rules on a source."""
    sides = Sides.opened(place, terms, work)
    with closing(sides.journal):
        return {
            "source": {"name": place.name, "sha256": sides.source.fingerprint()},
            "backbone": {"repo": terms.backbone, "revision": sides.backbone.ref.revision},
            "codec": sides.codec,
            "rules": {rule: measured(sides, rule) for rule in RULES},
        }
