"""Few fitted steps against the published sampler: speed, distance to many steps, students.

    python -m benchmarks fitted --real cifar10 --work work/fitted
    python -m benchmarks fitted --work work/fitted --rates      # speed, on a quiet machine

`--real` has train/ and test/ with one folder a class. Packs of 50 images a class are encoded with
five fitted steps, with these in one pass instead of guidance, with the twelve steps of the
published sampler, and with four fitted steps; all else is equal. `--only` names some of them.
Packs and students are kept in `--work`: what is there is not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, command, load, save
from d3pack.backbones import Sampling, open_backbone
from d3pack.decode import Decoder, samplers
from d3pack.encode import D3MSettings, EncodeSettings, encode, sigmas_of
from d3pack.evaluate import Bench
from d3pack.evaluate.baselines import pack_entry
from d3pack.format import Pack, Recipe, read
from d3pack.sources import open_source
from d3pack.students import PROTOCOLS
from d3pack.students.real import RealImages, common_size
from d3pack.system import Events

WHAT = (__doc__ or "").partition("\n")[0]
PER_CLASS = 50
ARMS = {
    "fitted 5": D3MSettings(fitted_steps=5),
    "one pass 5": D3MSettings(fitted_steps=5, one_pass=True),
    "published": D3MSettings(fitted_steps=0),
    "fitted 4": D3MSettings(fitted_steps=4),
}
MANY = 60  # steps that stand for exact ones
IMAGES = 60  # whose latents are compared
ROUNDS, TIMED = 3, 320


def made(real: str | None, work: Path, arm: str) -> Pack | None:
    """The pack of an arm, encoded when it is not there; None without real images."""
    path = work / f"{arm.replace(' ', '-')}.d3m"
    if path.exists():
        return read(path)
    if real is None:
        return None
    settings = EncodeSettings(images_per_class=PER_CLASS, method_settings=ARMS[arm])
    return encode(open_source(real, split="train"), path, settings)


def distances(pack: Pack) -> dict[str, float]:
    """Mean squared distance of latents to those of many steps, as a share of their variance."""
    backbone = open_backbone(pack.recipe.backbone)
    pack = replace(pack, picks=None, probes=None, seed=pack.seed + 1)

    def latents(recipe: Recipe) -> torch.Tensor:
        def run(model: samplers.Model, noise: torch.Tensor) -> torch.Tensor:
            x = samplers.start(noise, recipe.sigmas)
            return samplers.sample(recipe.sampler, model, x, recipe.sigmas, None, recipe.extra)

        with Decoder(replace(pack, recipe=recipe), device="cpu", backbone=backbone) as decoder:
            chosen = [(i % len(pack.classes), i // len(pack.classes)) for i in range(IMAGES)]
            return decoder.explore(chosen, run)

    def published(steps: int) -> Recipe:
        sampling = Sampling("dpmpp-2m", steps, pack.recipe.guidance)
        sigmas = sigmas_of(backbone, sampling.sampler, steps, pack.recipe.size)
        return replace(pack.recipe, sampler=sampling.sampler, sigmas=sigmas, extra={})

    exact = latents(published(MANY))

    def share(recipe: Recipe) -> float:
        return round(float((latents(recipe) - exact).square().mean() / exact.var()), 5)

    own = len(pack.recipe.sigmas) - 1
    return {"own": share(pack.recipe), f"dpmpp-2m {own}": share(published(own))}


def rate(pack: Pack) -> list[float]:
    """Images a second, round by round, with as many threads as torch has."""
    with Decoder(pack, device="cpu") as decoder:
        numbers = [i % len(pack) for i in range(TIMED)]
        decoder.images(numbers[:64])
        rates = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            decoder.images(numbers)
            rates.append(round(len(numbers) / (time.perf_counter() - began), 1))
        return rates


def taught(pack: Pack, bench: Bench, seeds: int) -> dict[str, Any]:
    """Accuracy of students on real test images."""
    title = f"{len(pack.recipe.sigmas) - 1} steps"
    entry = pack_entry(bench, "pack", title, pack, pack.ledger().total)
    result = bench.run(entry, seeds)
    runs = [history.last for history in result.histories]
    return {"mean": result.last.mean, "std": result.last.std, "runs": runs}


def main(arguments: Sequence[str]) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--real")
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=ARMS, default=[*ARMS])
    options.add_argument("--rates", action="store_true", help="measure speed alone")
    args = options.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    bench = None
    if args.real is not None and not args.rates:
        train = open_source(args.real, split="train")
        test = open_source(args.real, split="test")
        size = common_size(test)
        bench = Bench(
            RealImages(train, train.classes, size, "training"),
            RealImages(test, train.classes, size, "test"),
            PER_CLASS * len(train.classes),
            PROTOCOLS["quick"],
            args.work,
            events=Events([]),
        )
    figures = load("fitted")
    for arm in args.only:
        pack = made(args.real, args.work, arm)
        if pack is None:
            continue
        row = figures.setdefault(arm, {})
        row |= {
            "steps": len(pack.recipe.sigmas) - 1,
            "guidance": pack.recipe.guidance,
            "bytes": pack.ledger().total,
            "images": len(pack),
        }
        if args.rates:
            row["images_per_second"] = rate(pack)
        else:
            row["distance"] = distances(pack)
        if bench is not None:
            row["accuracy"] = taught(pack, bench, args.seeds)
        print(row, flush=True)
        save(RESULTS / "fitted.json", WHAT, command("fitted", arguments), figures)
