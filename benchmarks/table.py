"""The committed table: packs of 1 to 100 kB against every baseline, on real test images.

    python benchmarks/table.py cifar10 --real cifar10 --work work/cifar10 --arms random,sheet,webp
    python benchmarks/table.py cifar10 --real cifar10 --work work/cifar10          # all the rest
    python benchmarks/table.py cifar10 --list                                      # what is missing

`--real` has train/ and test/ with one folder a class. Every student is kept in `--work` and its row
in `results/table-NAME.json`, so the table can be made bit by bit and in any order. Seed 0 of every
cell comes first, then seed 1, and so on: a table that is stopped early has fewer seeds, not fewer
rows.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d3pack.backbones import open_backbone
from d3pack.encode import D3MSettings, EncodeSettings, encode
from d3pack.encode.methods.d3m.method import prepare
from d3pack.errors import D3MError
from d3pack.evaluate import baselines, presets
from d3pack.evaluate.baselines import Arm
from d3pack.evaluate.bench import ArmResult, Bench
from d3pack.evaluate.evaluation import EvalOptions, decode_seconds, make_bench, squeeze_for
from d3pack.evaluate.ledger import view
from d3pack.evaluate.payload import Squeeze, file_bytes
from d3pack.evaluate.real import RealImages, common_size
from d3pack.evaluate.teacher import open_judge
from d3pack.evaluate.workdir import Workdir, write_json
from d3pack.format import read
from d3pack.format.codecs import encode_prompts
from d3pack.format.pack import Pack
from d3pack.sources import open_source

RESULTS = Path(__file__).parent / "results"
BUDGETS = (1_000, 3_000, 6_000, 10_000, 30_000, 100_000)
PER_CLASS = 50  # random real images of each class, without loss
# images of each class that packs of these sizes make: a picked seed costs three to six bits
PACKED = {6_000: 150, 10_000: 250, 30_000: 200, 100_000: 150}
NAMED = 200  # images of each class name: they cost nothing
ARMS = ("pack", "names", "random", "sheet", "avif", "webp", "jpeg", "collages", "chosen")
CHOSEN = {"collages": "sheet", "chosen": "avif"}  # what patches that a teacher has chosen travel as


@dataclass(frozen=True)
class Cell:
    """One row at one size; `make` may train pilots, a teacher, or a pack."""

    arm: str
    budget: int | None
    make: Callable[[], Arm | None]

    def __str__(self) -> str:
        return self.arm if self.budget is None else f"{self.arm} {self.budget:,} B"


class Table:
    """Everything about one target."""

    def __init__(self, args: argparse.Namespace) -> None:
        train = open_source(args.real, split="train")
        test = open_source(args.real, split="test")
        size = common_size(test)
        self.args = args
        self.work = Workdir(args.work)
        self.train = RealImages(train, train.classes, size, "training")
        self.test = RealImages(test, train.classes, size, "test")
        self.options = EvalOptions(presets.QUICK, backbone=args.backbone)
        self._bench: Bench | None = None
        self._packs: dict[int, Pack | None] = {}
        self._arms: dict[str, Arm | None] = {}

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            classes = self.train.source.classes
            images = PER_CLASS * len(classes)
            self._bench = make_bench(
                classes, images, self.train, self.test, self.work, self.options, report=say
            )
        return self._bench

    def cells(self, wanted: list[str]) -> Iterator[Cell]:
        for arm in wanted:
            if arm == "random":
                yield Cell(arm, None, lambda: baselines.random_images(self.train, PER_CLASS))
            elif arm == "names":
                yield Cell(arm, None, self.names)
            else:
                for budget in map(int, self.args.budgets.split(",")):
                    yield Cell(arm, budget, self.maker(arm, budget))

    def maker(self, arm: str, budget: int) -> Callable[[], Arm | None]:
        if arm == "pack":
            return lambda: self.pack_arm(budget)
        if arm in CHOSEN:
            return lambda: self.collages(budget, CHOSEN[arm])
        return lambda: self.real_bytes(arm, budget)

    def arm(self, cell: Cell) -> Arm | None:
        if str(cell) not in self._arms:
            self._arms[str(cell)] = cell.make()
        return self._arms[str(cell)]

    def squeeze(self, payload: str, budget: int) -> tuple[Squeeze | None, dict[str, float]]:
        return squeeze_for(self.train, budget, self.bench, payload, self.work)

    def real_bytes(self, arm: str, budget: int) -> Arm | None:
        squeeze, pilot = self.squeeze(arm, budget)
        if squeeze is None:
            return None
        return baselines.equal_bytes(self.train, budget, squeeze, pilot)

    def collages(self, budget: int, payload: str) -> Arm | None:
        squeeze, _ = self.squeeze(payload, budget)
        if squeeze is None:
            return None
        judge = open_judge("train", self.train, self.work, "cpu", say)
        return baselines.collages(judge.patches, self.train, budget, squeeze, judge.identity)

    def pack(self, budget: int) -> Pack | None:
        """The pack of this budget, learned when it is not there; None when none is so small."""
        if budget not in self._packs:
            path = self.args.packs / f"{self.args.name}-{budget}.d3m"
            settings = EncodeSettings(
                images_per_class=self.args.images or PACKED.get(budget, PER_CLASS),
                budget=budget,
                teacher_samples=self.args.teacher_samples,
                guidance=self.args.guidance,
                backbone=str(self.args.backbone or "mini"),
            )
            try:
                found = read(path) if path.exists() else encode(self.train.source, path, settings)
            except D3MError as error:
                say(f"no pack of {budget:,} bytes: {error}")
                found = None
            self._packs[budget] = found
        return self._packs[budget]

    def names(self) -> Arm | None:
        """The recipe that encode would choose, prompted by class names: nothing is learned."""
        opened = open_backbone(str(self.args.backbone or "mini"))
        source = self.train.source
        unpicked = EncodeSettings(images_per_class=NAMED, candidates=1)
        job = prepare(source, unpicked, D3MSettings(), opened)
        width = opened.prompt_shape[1]
        blank = Pack(
            classes=source.classes,
            images_per_class=NAMED,
            recipe=job.recipe(),
            prompts=encode_prompts(np.zeros((len(source.classes), 1, 1, width), np.float32)),
            seed=job.plan.seed,
        )
        twin = baselines.names_pack(blank, opened.name_vectors, opened.prompt_shape[0])
        free = twin.ledger().total - baselines.prompt_bytes(twin)
        decode = self.bench.training_set
        return baselines.pack_arm("names", "class names as prompts", twin, decode, free)

    def pack_arm(self, budget: int) -> Arm | None:
        pack = self.pack(budget)
        if pack is None:
            return None
        total = pack.ledger().total
        title = f"a pack of {total:,} bytes"
        training_set = self.bench.training_set
        return baselines.pack_arm(f"pack-{budget}", title, pack, training_set, total)

    def record(self, cell: Cell, result: ArmResult) -> None:
        """Put one row into the results file; rows of another protocol are dropped."""
        identity = {key: self.bench.identity[key] for key in ("preset", "operations", "student")}
        value = load(self.args.name)
        if value.get("protocol") != identity:
            value = {"rows": {}, "packs": {}}
        value["rows"][str(cell)] = {"arm": cell.arm, "budget": cell.budget, **result.to_json()}
        pack = self._packs.get(cell.budget or 0)
        if cell.arm == "pack" and pack is not None:
            about = {
                "root": pack.root,
                "images_per_class": pack.images_per_class,
                "provenance": json.loads(json.dumps(pack.manifest["provenance"], default=dict)),
                "decode_seconds": decode_seconds(pack, self.bench, self.work),
                "ledger": view(pack, self.jpeg()).to_json(),
            }
            value["packs"][str(cell.budget)] = about
        value |= {
            "target": self.args.name,
            "protocol": identity,
            "test_images": len(self.bench.test.images),
            "classes": list(self.train.source.classes),
            "per_class": PER_CLASS,
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "torch": torch.__version__,
        }
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"table-{self.args.name}.json", value)

    def jpeg(self) -> float:
        return file_bytes(
            self.train.draw(10, 0).images, Squeeze("JPEG", "files", 75, self.train.size)
        )


def say(text: str) -> None:
    print(text, flush=True)


def load(name: str) -> dict[str, Any]:
    """The results so far."""
    try:
        found: dict[str, Any] = json.loads((RESULTS / f"table-{name}.json").read_text("utf-8"))
    except FileNotFoundError:
        found = {"rows": {}, "packs": {}}
    return found


def names_of_cells() -> list[str]:
    """Every cell of a complete table."""
    single = [arm for arm in ARMS if arm in ("names", "random")]
    return single + [
        f"{arm} {budget:,} B" for arm in ARMS if arm not in single for budget in BUDGETS
    ]


def show(name: str, seeds: int) -> None:
    """The table so far, and what it lacks."""
    rows = load(name)["rows"]
    missing = 0
    for cell in names_of_cells():
        row = rows.get(cell)
        runs = len(row["runs"]) if row else 0
        missing += max(seeds - runs, 0)
        if row is None:
            say(f"{cell:18s} missing")
            continue
        size = "-" if row["bytes"] is None else f"{row['bytes']:,.0f} B"
        last = row["last"]
        say(
            f"{cell:18s} {size:>12s}  {100 * last['mean']:5.1f} ± {100 * last['std']:.1f} %"
            f"  ({runs} seeds)  {'; '.join(row['notes'])}"
        )
    say(f"{missing} students missing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="of the target: part of the results' file name")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--packs", type=Path, help="where packs are, or are made [WORK/packs]")
    parser.add_argument("--backbone", type=Path, help="a directory instead of the embedded mini")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of a class that packs make [by their size]")
    parser.add_argument("--guidance", type=float, help="of packs [by measurement, for each]")
    parser.add_argument(
        "--teacher-samples", type=int, default=EncodeSettings().teacher_samples, help="of encode"
    )
    parser.add_argument("--list", action="store_true", help="train nothing, say what is missing")
    args = parser.parse_args()
    if not args.list:
        if args.real is None or args.work is None:
            parser.error("--real and --work are needed to train")
        args.packs = args.packs or args.work / "packs"
        args.packs.mkdir(parents=True, exist_ok=True)
        table = Table(args)
        cells = list(table.cells(args.arms.split(",")))
        for seed in range(args.seeds):
            for cell in cells:
                arm = table.arm(cell)
                if arm is not None:
                    table.record(cell, table.bench.run(arm, seed + 1))
    show(args.name, args.seeds)


if __name__ == "__main__":
    main()
