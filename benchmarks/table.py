"""The committed table: packs of 1 to 100 kB against every baseline, on real test images.

    python -m benchmarks table cifar10 --real cifar10 --work work/cifar10 --arms random,sheet,webp
    python -m benchmarks table cifar10 --real cifar10 --work work/cifar10          # all the rest
    python -m benchmarks table cifar10 --list                                      # what is missing
    python -m benchmarks table cifar10 --real cifar10 --work work/cifar10 --arms avif --payload \
        "AVIF sheet q10 28 px"                  # random photographs with settings that you choose

`--real` has train/ and test/ with one folder a class. Every student is kept in `--work` and its row
in `results/table-NAME.json`, so the table can be made bit by bit and in any order. Seed 0 of every
cell comes first, then seed 1, and so on: a table that is stopped early has fewer seeds, not fewer
rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS, code, command, machine, save
from benchmarks.results import load as load_result
from d3pack.backbones import open_backbone
from d3pack.encode import D3MSettings, EncodeSettings, encode
from d3pack.encode.methods.d3m.method import prepare
from d3pack.errors import D3MError
from d3pack.evaluate import Bench, Entry, EntryResult, baselines
from d3pack.evaluate.entries import Choice
from d3pack.evaluate.evaluation import LedgerView, jpeg_bytes
from d3pack.evaluate.payload import candidates
from d3pack.evaluate.teacher import open_teacher
from d3pack.format import Pack, read
from d3pack.format.codecs import encode_prompts
from d3pack.sources import open_source
from d3pack.students import PROTOCOLS, lengths
from d3pack.students.real import RealImages, common_size
from d3pack.system import Events
from d3pack.teachers import SAMPLES

WHAT = "Packs of 1 to 100 kB beside every baseline: accuracy on real test images"
FORMATS = {format.name: format for format in baselines.PAYLOADS}
BUDGETS = (1_000, 3_000, 6_000, 10_000, 30_000, 100_000)
PER_CLASS = 50  # random real images of each class, without loss
NAMED = 200  # images of each class name: they cost nothing
CHOICES = {choice.name: choice for choice in baselines.CHOICES}
SINGLE = ("names", "random", "whole")  # arms of one size
ARMS = ("pack", *SINGLE, *(format.name for format in baselines.PAYLOADS), *CHOICES)


@dataclass(frozen=True)
class Cell:
    """One row at one size; `make` may train pilots, a teacher, or a pack."""

    arm: str
    budget: int | None
    make: Callable[[], Entry | None]
    payload: str | None = None  # settings that were chosen by hand

    def __str__(self) -> str:
        text = self.arm if self.budget is None else f"{self.arm} {self.budget:,} B"
        return text if self.payload is None else f"{text}, {self.payload}"


class Arguments(argparse.Namespace):
    """What the command line says."""

    name: str
    real: Path | None
    work: Path | None
    packs: Path | None
    backbone: Path | None
    arms: str
    budgets: str
    sheets: str
    seeds: int
    protocol: str
    payload: str | None
    images: int | None
    guidance: float | None
    teacher_samples: int
    list: bool


class Table:
    """Everything about one target."""

    def __init__(self, args: Arguments, real: Path, work: Path) -> None:
        train = open_source(real, split="train")
        test = open_source(real, split="test")
        size = common_size(test)
        self.args = args
        self.work = work
        self.folder = args.packs or work / "packs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.protocol = PROTOCOLS[args.protocol]
        self.train = RealImages(train, train.classes, size, "training")
        self.test = RealImages(test, train.classes, size, "test")
        self.events = Events([lambda event: say(event["text"]) if "text" in event else None])
        self._bench: Bench | None = None
        self._packs: dict[int, Pack | None] = {}
        self._entries: dict[str, Entry | None] = {}

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = Bench(
                self.train,
                self.test,
                PER_CLASS * len(self.train.classes),
                self.protocol,
                self.work,
                backbone=self.args.backbone,
                events=self.events,
            )
        return self._bench

    def cells(self, wanted: list[str]) -> Iterator[Cell]:
        for arm in wanted:
            if arm == "random":
                yield Cell(arm, None, lambda: baselines.random_entry(self.train, PER_CLASS))
            elif arm == "names":
                yield Cell(arm, None, self.names)
            elif arm == "whole":
                yield Cell(arm, None, lambda: baselines.whole_entry(self.train))
            else:
                payload = self.args.payload if arm in FORMATS else None
                for budget in map(int, self.args.budgets.split(",")):
                    yield Cell(arm, budget, self.maker(arm, budget), payload)

    def maker(self, arm: str, budget: int) -> Callable[[], Entry | None]:
        if arm == "pack":
            return lambda: self.pack_entry(budget)
        if arm in CHOICES:
            return lambda: self.chosen(budget, CHOICES[arm])
        if self.args.payload is not None:
            known = {str(s): s for s in candidates(FORMATS[arm], self.train.size)}
            if self.args.payload not in known:
                raise SystemExit(f"no such payload: expected one of {', '.join(known)}")
            settings = known[self.args.payload]
            return lambda: baselines.equal_bytes(self.train, settings, budget, {})
        return lambda: baselines.payload_entry(self.bench, FORMATS[arm], budget)

    def entry(self, cell: Cell) -> Entry | None:
        if str(cell) not in self._entries:
            self._entries[str(cell)] = cell.make()
        return self._entries[str(cell)]

    def chosen(self, budget: int, choice: Choice) -> Entry | None:
        if self.bench.teacher is None:
            device = torch.device("cpu")
            teacher = open_teacher("train", self.train, self.bench.shared, device, self.events)
            self.bench.teacher = teacher
        sheets = tuple(FORMATS[name] for name in self.args.sheets.split(","))
        return baselines.chosen_entry(self.bench, choice, budget, sheets)

    def pack(self, budget: int) -> Pack | None:
        """The pack of this budget, learned when it is not there; None when none is so small."""
        if budget not in self._packs:
            path = self.folder / f"{self.args.name}-{budget}.d3m"
            settings = EncodeSettings(
                images_per_class=self.args.images,
                budget=budget,
                for_updates=lengths(self.protocol, PER_CLASS, len(self.train.classes)).updates,
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

    def names(self) -> Entry | None:
        """The recipe that encode would choose, prompted by class names: nothing is learned."""
        opened = open_backbone(str(self.args.backbone or "mini"))
        source = self.train.source
        unpicked = EncodeSettings(images_per_class=NAMED, candidates=1)
        # the published sampler: there are no prompts to fit another to
        job = prepare(source, unpicked, D3MSettings(fitted_steps=0), opened)
        width = opened.prompt_shape[1]
        blank = Pack(
            classes=source.classes,
            images_per_class=NAMED,
            recipe=job.recipe(),
            prompts=encode_prompts(np.zeros((len(source.classes), 1, 1, width), np.float32)),
            seed=job.plan.seed,
        )
        twin = baselines.names_pack(blank, opened.name_vectors, opened.prompt_shape[0])
        return baselines.names_entry(self.bench, twin)

    def pack_entry(self, budget: int) -> Entry | None:
        pack = self.pack(budget)
        if pack is None:
            return None
        total = pack.ledger().total
        title = f"a pack of {total:,} bytes"
        return baselines.pack_entry(self.bench, f"pack-{budget}", title, pack, total)

    def record(self, cell: Cell, result: EntryResult, command_line: str) -> None:
        """Put one row into the results file; rows of another protocol are dropped."""
        identity = json.loads(json.dumps(asdict(self.protocol)))
        value = load(self.args.name)
        if value.get("protocol") != identity:
            value = {"rows": {}, "packs": {}}
        made = {"command": command_line, "code": code(), "machine": machine()["processor"]}
        row = {"arm": cell.arm, "budget": cell.budget, "made": made}
        value["rows"][str(cell)] = row | result.to_json()
        pack = self._packs.get(cell.budget or 0)
        if cell.arm == "pack" and pack is not None:
            about = {
                "root": pack.root,
                "images_per_class": pack.images_per_class,
                "provenance": json.loads(json.dumps(pack.provenance, default=dict)),
                "decode_seconds": self.bench.decode_seconds(pack),
                "ledger": asdict(LedgerView.of(pack, jpeg_bytes(self.train))),
            }
            value["packs"][str(cell.budget)] = about
        value |= {
            "target": self.args.name,
            "protocol": identity,
            "test_images": len(self.bench.test.images),
            "classes": list(self.train.source.classes),
            "per_class": PER_CLASS,
        }
        save(RESULTS / f"table-{self.args.name}.json", WHAT, command_line, value)


def say(text: str) -> None:
    print(text, flush=True)


def load(name: str) -> dict[str, Any]:
    """The results so far."""
    return load_result(RESULTS / f"table-{name}.json") or {"rows": {}, "packs": {}}


def names_of_cells() -> list[str]:
    """Every cell of a complete table."""
    return [*SINGLE] + [
        f"{arm} {budget:,} B" for arm in ARMS if arm not in SINGLE for budget in BUDGETS
    ]


def show(name: str, seeds: int) -> None:
    """The table so far, and what it lacks."""
    rows = load(name)["rows"]
    missing = 0
    names = names_of_cells()
    for cell in [*names, *(name for name in rows if name not in names)]:
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


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the arguments that say what a table is made of."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="of the target: part of the results' file name")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--packs", type=Path, help="where packs are, or are made [WORK/packs]")
    parser.add_argument("--backbone", type=Path, help="a directory instead of the embedded mini")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    sheets = ",".join(format.name for format in baselines.SHEETS)
    parser.add_argument("--sheets", default=sheets, help="of chosen photographs [%(default)s]")
    parser.add_argument("--payload", help="settings of random photographs [by pilots]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--protocol", default="standard", choices=("quick", "standard"))
    parser.add_argument("--images", type=int, help="of a class that packs make [by pilots]")
    parser.add_argument("--guidance", type=float, help="of packs [by measurement, for each]")
    parser.add_argument("--teacher-samples", type=int, default=SAMPLES, help="of encode")
    return parser


def open_table(options: argparse.ArgumentParser, args: Arguments) -> Table:
    """Return the table of what the command line says, or end with what it lacks."""
    if args.real is None or args.work is None:
        options.error("--real and --work are needed to train")
    return Table(args, args.real, args.work)


def main(arguments: Sequence[str]) -> None:
    options = parser()
    options.add_argument("--list", action="store_true", help="train nothing, say what is missing")
    args = options.parse_args(arguments, namespace=Arguments())
    if not args.list:
        table = open_table(options, args)
        cells = list(table.cells(args.arms.split(",")))
        for seed in range(args.seeds):
            for cell in cells:
                entry = table.entry(cell)
                if entry is not None:
                    result = table.bench.run(entry, seed + 1)
                    table.record(cell, result, command("table", arguments))
    show(args.name, args.seeds)
