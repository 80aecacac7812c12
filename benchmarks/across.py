"""Whether a pack's lead holds for other students: packs and photographs of equal bytes.

    python -m benchmarks across cifar10 --real cifar10 --work work [--students convnet3,vit6]
                                [--budgets 6000,30000] [--seeds 3]

Packs are those of `table`, in `--packs`, and are made where they are missing. The photographs are
those that did best in the committed table of `--protocol`, random ones or those that a teacher
chooses, as pilots of ConvNet-3 compressed them: nobody who sends images knows the student. Students
are trained by that protocol, and tested once, at the end. Seed 0 of every cell comes first;
finished students are kept in `--work`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import table as tables
from benchmarks.figure import best_of
from benchmarks.readme import lead, pairs_of
from benchmarks.results import RESULTS, code, command, load, save
from d3pack.evaluate import Bench, Entry, baselines
from d3pack.evaluate.entries import PayloadSettings
from d3pack.evaluate.payload import candidates
from d3pack.evaluate.teacher import open_teacher
from d3pack.students import Intervals

WHAT = (__doc__ or "").partition("\n")[0]
STUDENTS = "convnet3,vit6,resnetap10,resnet18"
CHOSEN = baselines.CHOICES[0]


@dataclass(frozen=True)
class Cell:
    """Students of one architecture, one training set."""

    student: str
    arm: str
    budget: int
    entry: Entry

    def __str__(self) -> str:
        return f"{self.student}, {self.arm}, {self.budget:,} B"


class Arguments(tables.Arguments):
    """What the command line says."""

    students: str
    tuned: str


def tuned(name: str, budget: int, size: int) -> tuple[bool, PayloadSettings]:
    """Return whether a teacher chose the best photographs of a committed table, and how they fit.

    The best by test accuracy, in their favour.
    """
    table = load(f"table-{name}")
    arms = [CHOSEN.name, *(format.name for format in baselines.SHEETS)]
    (best,) = [row for row in best_of(table, arms) if row["budget"] == budget]
    known = {str(s): s for format in baselines.SHEETS for s in candidates(format, size)}
    return best["arm"] == CHOSEN.name, known[best["detail"]["payload"]]


def entries(table: tables.Table, name: str, budget: int) -> Iterator[tuple[str, Entry]]:
    """Yield what students are trained on: the pack, and photographs of as many bytes."""
    pack = table.pack_entry(budget)
    if pack is not None:
        yield "pack", pack
    chosen, settings = tuned(name, budget, table.train.size)
    if chosen:
        yield "photographs", baselines.chosen_payload(table.bench, CHOSEN, settings, budget, {})
    else:
        yield "photographs", baselines.equal_bytes(table.train, settings, budget, {})


def benches(table: tables.Table, students: Sequence[str]) -> dict[str, Bench]:
    """Return a bench for every architecture; all share the images of the first."""
    found = {}
    for student in students:
        protocol = replace(table.protocol, student=student, tests=Intervals())
        images, work = len(table.train.classes) * tables.PER_CLASS, table.work / "students"
        found[student] = Bench(table.train, table.test, images, protocol, work, events=table.events)
    return found


def margins(rows: dict[str, Any]) -> list[str]:
    """Return one line for each architecture and size: pack, photographs, and the difference."""
    lines = []
    for row, other in pairs_of(rows):
        one, two = (
            f"{100 * each['last']['mean']:.1f} ± {100 * each['last']['std']:.1f}"
            for each in (row, other)
        )
        what = f"{row['student']:12} {row['budget']:>7,} B"
        lines.append(f"{what}: {one} against {two} %: {lead(row, other):+.1f}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = tables.parser(__doc__)
    parser.add_argument("--students", default=STUDENTS, help="architectures [%(default)s]")
    parser.add_argument(
        "--tuned", help="name of the table that chose settings [that of the protocol]"
    )
    parser.set_defaults(budgets="6000,30000", protocol="standard")
    args = parser.parse_args(arguments, namespace=Arguments())
    table = tables.open_table(parser, args)
    table.bench.teacher = open_teacher(
        "train", table.train, table.bench.shared, torch.device("cpu"), table.events
    )
    of = benches(table, args.students.split(","))
    name = args.tuned or (args.name if args.protocol == "quick" else f"{args.name}-standard")
    by_budget = {b: [*entries(table, name, b)] for b in map(int, args.budgets.split(","))}
    cells = [
        Cell(student, arm, budget, entry)
        for budget, pair in by_budget.items()
        for student in of
        for arm, entry in pair
    ]
    path = RESULTS / f"across-{args.name}.json"
    facts = {"protocol": args.protocol, "code": code()}
    figures = load(path)
    if {key: figures.get(key) for key in facts} != facts:
        figures = {**facts, "rows": {}}
    for seed in range(args.seeds):
        for cell in cells:
            known = figures["rows"].get(str(cell))
            settings = cell.entry.detail.get("payload")
            if known and known["detail"].get("payload") != settings:
                known = None  # of photographs that were compressed otherwise
            if known and len(known["runs"]) > seed:
                continue
            result = of[cell.student].run(cell.entry, seed + 1)
            about = {"student": cell.student, "arm": cell.arm, "budget": cell.budget}
            figures["rows"][str(cell)] = {**about, **result.to_json()}
            save(path, WHAT, command("across", arguments), figures)
    print("\n".join(margins(figures["rows"])))
