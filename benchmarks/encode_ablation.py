"""What each setting of `d3pack encode` is worth: student accuracy, teacher agreement, bytes.

    python -m benchmarks encode_ablation TRAIN TEST --work DIR --seeds 3 default names vectors=2

A variant is a setting, or several joined by commas; everything else stays at the defaults. `names`
is the pack of the defaults prompted by class names alone; with `steps=0,cool=0` nothing is learned
either, but seeds are picked for the names. Students are ConvNet-3 under the preset `quick` of
`d3pack eval`. Results are added to the JSON, so the work can be spread over many calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import RESULTS, command, load, save
from d3pack.decode import Decoder
from d3pack.encode import D3MSettings, EncodeRun, EncodeSettings, encode
from d3pack.encode.methods.d3m.method import D3M, D3MJob
from d3pack.evaluate.baselines import named_twin
from d3pack.evaluate.bench import Spread
from d3pack.format import pack_bytes
from d3pack.format.codecs import decode_labels
from d3pack.format.pack import Pack
from d3pack.sources import Source, open_source
from d3pack.students import LabelledImages, train_student
from d3pack.students.protocols import QUICK

WHAT = "What each setting of encode is worth: student accuracy, teacher agreement, bytes."
# Settings that change the collages: with one of these they are made anew.
CUTTING = {"factor", "pool", "crops", "crop_scale", "collages", "modes", "seed"}


class SharedJob(D3MJob):
    """The job, with collages that runs of equal cutting have in common."""

    folder: Path

    def _make_collages(self, run: EncodeRun, teacher: Any, classes: Sequence[int]) -> None:
        values = {**asdict(self.own), "seed": self.settings.seed}
        key = json.dumps({k: v for k, v in values.items() if k in CUTTING}, sort_keys=True)
        place = self.folder / f"collages-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        target = run.journal.folder / "classes"
        if place.exists() and not target.exists():
            target.mkdir()
            for file in place.iterdir():
                os.link(file, target / file.name)
        super()._make_collages(run, teacher, classes)
        if not place.exists():
            place.mkdir(parents=True)
            for file in target.iterdir():
                os.link(file, place / file.name)


class Shared(D3M):
    """The method, whose jobs share collages."""

    def prepare(self, *arguments: Any) -> D3MJob:
        job = super().prepare(*arguments)
        return SharedJob(**{field.name: getattr(job, field.name) for field in fields(job)})


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def exam(source: Source, most: int) -> tuple[Tensor, Tensor]:
    """Evenly many test images of each class."""
    each = most // len(source.classes)
    pictures = [
        np.asarray(source.load(c, i))
        for c in range(len(source.classes))
        for i in range(min(each, source.counts[c]))
    ]
    labels = [c for c in range(len(source.classes)) for _ in range(min(each, source.counts[c]))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def students(pack: Pack, path: Any, tests: tuple[Tensor, Tensor], seeds: int) -> list[float]:
    images = Decoder(pack, path=path).images(range(len(pack)))
    labels = torch.arange(len(pack.classes)).repeat_interleave(pack.images_per_class)
    soft = None
    if pack.labels is not None:
        soft = torch.from_numpy(decode_labels(pack.labels)).flatten(0, 1)
    train, test = LabelledImages(images, labels, soft=soft), LabelledImages(*tests)
    return [train_student(train, test, QUICK, seed).last for seed in range(seeds)]


def figures(accuracies: list[float]) -> dict[str, Any]:
    spread = Spread.of(accuracies)  # as in every other table: of the sample
    return {
        "accuracy": round(spread.mean, 4),
        "std": round(spread.std, 4),
        "seeds": [round(a, 4) for a in accuracies],
    }


def main(arguments: Sequence[str]) -> None:
    """Measure some variants, and add them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("variants", nargs="*", default=["default", "names"])
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--base", nargs="*", default=[], help="settings that all variants share")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="students each; 0: losses alone")
    parser.add_argument("--tests", type=int, default=4000)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "encode_ablation.json")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    source, tests = open_source(args.train), exam(open_source(args.test, split="test"), args.tests)
    path = args.backbone if Path(args.backbone).is_dir() else None
    base = {k: value_of(v) for k, v in (text.split("=", 1) for text in args.base)}
    results = load(args.output)
    SharedJob.folder = args.work
    own_names = {field.name for field in fields(D3MSettings)}
    for variant in args.variants:
        changes = {}
        if variant not in {"default", "names"}:
            changes = dict(text.split("=", 1) for text in variant.split(","))
        values = {**base, **{k: value_of(v) for k, v in changes.items()}}
        settings = EncodeSettings(
            images_per_class=args.ipc,
            backbone=args.backbone,
            provenance="full",  # with the metrics
            method_settings=D3MSettings(**{k: v for k, v in values.items() if k in own_names}),
            **{k: v for k, v in values.items() if k not in own_names},
        )
        name = "-".join([variant, *args.base]).replace("/", "_").replace(" ", "_")
        output = (
            args.work / f"{name if variant != 'names' else '-'.join(['default', *args.base])}.d3m"
        )
        pack = encode(source, output, settings, method=Shared())
        size = len(pack_bytes(pack))
        if variant == "names":
            from d3pack.backbones import open_backbone

            backbone = open_backbone(args.backbone)
            pack = named_twin(pack, backbone)
            size = 0
        revision = pack.recipe.backbone.revision[:8]
        key = f"{variant} | {' '.join(args.base)} | ipc {args.ipc} | {revision}"
        found = figures(students(pack, path, tests, args.seeds)) if args.seeds else {}
        metrics = dict(pack.provenance.get("metrics", {}))
        results[key] = {**found, "bytes": size, "metrics": metrics}
        print(key, json.dumps(results[key]), flush=True)
        save(args.output, WHAT, command("encode_ablation", arguments), results)
