"""Prompts of `encode` against textual inversion class by class: first hit against first hit.

    python -m benchmarks encode cifar10 --work work/encode
    python -m benchmarks encode cifar10 --work work/encode --second fashion-mnist

A source has train/ and test/ with one folder a class. Ours is what `d3pack encode` does where
nothing is set: a teacher, collages, one prompt for each class of the source in groups, in the
codec of the pack. The peer (`encode_peer`) learns from the same collages, from all of them, since
it judges nothing; ours keeps a fifth back to judge itself. It runs twice: with the rate of its
example, and with the one whose end was best for a class that is not examined. Classes are drawn.

Both sides are examined alike: by the loss on fixed (latent, t, noise) triples of collages of test
images, which neither side sees, at every 80 samples (forward and backward passes), from 1,600 on at
every 400, and at the end. Ours is examined as a pack would hold it at that moment, the peer as it
is. A hit is the first judgement at or below a loss, for either side. Two losses are asked for: the
peer's last, the better of its two runs, and ours of the pack; whichever run of the peer hits first
counts. Examining costs neither side anything. Everything else is counted, apart: teacher, collages,
their latents, judging and inversion; the peer has no judging and encodes at every step. What ours
does for all classes at once is shared by samples (inversion, judging) or evenly (teacher).

`--second` is examined once, after the first is done, with the rate tuned there. All is kept in
`--work`: a benchmark that was stopped goes on. Seconds are the processor's own, of one
thread; other work on the machine slows them a little, so each result has the load beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encode_peer import SCRIPT
from benchmarks.encode_sides import OFTEN, SELDOM, UNTIL, Point, Sides, Terms, report, rounded
from benchmarks.results import RESULTS, command, save
from d3pack.system import all_plain

WHAT = (__doc__ or "").partition("\n")[0]
RATES = (6e-5, 2e-4, 6e-4, SCRIPT["rate"], 6e-3, 2e-2, 6e-2)  # of the peer, to tune it
LATE = 5  # judgements at the end of a run, of which a rate is judged by the mean


def tuned(sides: Sides) -> dict[str, Any]:
    """Return the best rate of the peer for a class that is not examined, and all tried."""
    c = sides.terms.drawn()[0]
    tried: dict[float, list[Point]] = {}
    todo = [SCRIPT["rate"]]
    while todo:
        tried |= {rate: sides.peer_curve(c, rate) for rate in todo}
        best = RATES.index(min(tried, key=lambda rate: late(tried[rate])))
        todo = [rate for rate in RATES[max(0, best - 1) : best + 2] if rate not in tried]
    grid = [
        {"rate": rate, "late_loss": late(tried[rate]), "curve": tried[rate]}
        for rate in sorted(tried)
    ]
    return {"class": sides.source.classes[c], "rate": RATES[best], "grid": grid}


def compared(sides: Sides, c: int, rates: Sequence[float]) -> dict[str, Any]:
    """Return curves and races of a class."""
    ours = sides.our_curve(c)
    peer = {f"{rate:g}": sides.peer_curve(c, rate) for rate in rates}
    facts, seconds = sides.collages(c)[1], sides.ours()["seconds"]
    once = {
        "teacher": seconds["teacher"] / len(sides.source.classes),
        "collages": facts["collages"],
        "latents": facts["latents"],
    }
    ends = {"peer's end": min(curve[-1]["loss"] for curve in peer.values())}
    ends["our end"] = ours[-1]["loss"]
    return {
        "class": sides.source.classes[c],
        "seconds_once": rounded(once),
        "to": {name: race(loss, ours, peer, once) for name, loss in ends.items()},
        "load": {f"{rate:g}": sides.load(c, rate) for rate in rates},
        "ours": ours,
        "peer": peer,
    }


def figures_of(sides: Sides, rates: Sequence[float]) -> dict[str, Any]:
    """Return everything about a data set."""
    examined = [compared(sides, c, rates) for c in sides.terms.drawn()[1:]]
    return {
        "source": {"sha256": sides.source.fingerprint(), "classes": len(sides.source.classes)},
        "template": sides.template,
        "codec": sides.codec,
        "ours_all_classes": sides.ours(),
        "teacher_load": sides.journal["teacher"]["load"],
        "classes": examined,
    }


def first_hit(curve: Sequence[Point], loss: float) -> Point | None:
    """Return the first judgement at or below a loss."""
    return next((point for point in curve if point["loss"] <= loss), None)


def late(curve: Sequence[Point]) -> float:
    """Return the mean loss of the last judgements: the end of a constant rate is a swing."""
    return round(float(np.mean([point["loss"] for point in curve[-LATE:]])), 6)


def race(
    loss: float,
    ours: Sequence[Point],
    peer: Mapping[str, Sequence[Point]],
    once: Mapping[str, float],
) -> dict[str, Any]:
    """Return when each side first comes to a loss, and what that costs; None: never."""
    mine = first_hit(ours, loss)
    hits = [(hit, rate) for rate, curve in peer.items() if (hit := first_hit(curve, loss))]
    theirs = min(hits, key=lambda pair: int(pair[0]["samples"]), default=None)
    found: dict[str, Any] = {"loss": loss, "ours": mine}
    found["peer"] = None if theirs is None else {**theirs[0], "rate": theirs[1]}
    if mine is not None and theirs is not None and mine["samples"] and theirs[0]["samples"]:
        found["times"] = times(mine, theirs[0], once)
    return found


def times(ours: Point, peer: Point, once: Mapping[str, float]) -> dict[str, float]:
    """Return what the peer needs in units of what ours needs.

    `inversion` leaves encoding and judging out on both sides; `judged` counts them; `all` counts
    teacher and collages too, for ours alone.
    """
    learned, theirs = ours["seconds"], sum(peer["seconds"].values())
    judged = learned["inversion"] + learned["judging"] + once["latents"]
    ratios = {
        "samples": peer["samples"] / ours["samples"],
        "inversion": peer["seconds"]["inversion"] / learned["inversion"],
        "judged": theirs / judged,
        "all": theirs / (judged + once["teacher"] + once["collages"]),
    }
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def examine(
    terms: Terms, first: Path | str, second: Path | str | None, work: Path
) -> dict[str, Any]:
    """Return the figures of one or two data sets; the second is opened when the first is done."""
    figures: dict[str, Any] = {
        "backbone": {"repo": terms.backbone},
        "settings": all_plain(terms.own),
        "peer": {**SCRIPT, "steps": terms.peer_steps, "late": LATE},
        "exam": {"triples": terms.triples, "every": OFTEN, "until": UNTIL, "then": SELDOM},
        "seed": terms.seed,
        "sets": {},
    }
    rates: list[float] = []
    for name, place in (("first", first), ("second", second)):
        if place is None:
            continue
        sides = Sides.opened(place, terms, work / name)
        with closing(sides.journal):
            if not rates:
                figures["tuning"] = tuned(sides)
                rates = sorted({SCRIPT["rate"], figures["tuning"]["rate"]})
            figures["backbone"]["revision"] = sides.backbone.ref.revision
            figures["sets"][name] = {"name": Path(place).name, **figures_of(sides, rates)}
    return figures


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks encode",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    terms = Terms()
    parser.add_argument("source", type=Path, help="real images: train/ and test/")
    parser.add_argument("--second", type=Path, help="a data set to examine at the end")
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--backbone", default=terms.backbone)
    parser.add_argument("--classes", type=int, default=terms.classes, help="that ours learns")
    parser.add_argument("--examined", type=int, default=terms.examined, help="that are compared")
    parser.add_argument("--peer-steps", type=int, default=terms.peer_steps)
    parser.add_argument("--seed", type=int, default=terms.seed)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "encode.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Examine both sides on one or two data sets."""
    args = parsed(arguments)
    torch.set_num_threads(1)
    terms = Terms(
        backbone=args.backbone,
        classes=args.classes,
        examined=args.examined,
        peer_steps=args.peer_steps,
        seed=args.seed,
    )
    figures = examine(terms, args.source, args.second, args.work)
    save(args.output, WHAT, command("encode", arguments), figures)
    for name, found in figures["sets"].items():
        for one in found["classes"]:
            for end, result in one["to"].items():
                report(f"{name}, {one['class']}, to {end}: {result.get('times', 'not by both')}")
