"""`d3pack eval`: what a pack is worth."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.cli import _out
from d3pack.cli._fields import (
    Format,
    format_option,
    pack_argument,
    shard_option,
    without_shard,
    workers_field,
)
from d3pack.evaluate import EvalSettings
from d3pack.system import (
    REQUIRED,
    Shard,
    Workers,
    count,
    live_view,
    nested,
    option,
    printable,
    size,
)

if TYPE_CHECKING:
    from d3pack.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Eval:
    """Train students on a pack and on real images of equal size in bytes, and compare them.

    Example: d3pack eval cifar10.d3m --real cifar10 --report cifar10.html
    """

    pack: str = pack_argument()
    real: str = option(
        REQUIRED, "Real images: a folder with train/ and test/, or the training images."
    )
    test: str | None = option(None, "Real test images, where --real has no test/.")
    settings: EvalSettings = nested(EvalSettings)
    work: str | None = option(None, "Where finished students are kept. [PACK.eval]")
    report: Path | None = option(None, "Write one HTML page here.")
    class_names: Path | None = option(None, "Table from folder names to class names.")
    shard: Shard | None = shard_option()
    workers: Workers = workers_field()
    format: Format = format_option()

    def run(self) -> None:
        """Train the students, keep the figures and print them."""
        from d3pack.evaluate import evaluate, report_path, write_report

        if self.report is not None:
            report_path(self.report)
        without_shard(self.workers, self.shard)
        _out.if_interrupted("run the same command again and it goes on")
        if self.shard is not None:
            self._train(self.shard)
            return
        with nullcontext() if self.format == "quiet" else live_view() as listener:
            evaluation = evaluate(
                self.pack,
                self.real,
                self.settings,
                test=self.test,
                work=self.work,
                class_names=self.class_names,
                listeners=[listener] if listener else [],
                workers=self.workers,
            )
        if self.report is not None:
            write_report(evaluation, self.report)
        if self.format == "json":
            _out.emit(evaluation.to_json())
        elif self.format == "human":
            _print(evaluation)
            _out.say(f"all figures: {evaluation.work / 'evaluation.json'}")
            if self.report is not None:
                _out.say(f"report: {self.report}")

    def _train(self, shard: Shard) -> None:
        """Train the students of one share."""
        from d3pack.evaluate import evaluate_shard

        with nullcontext() if self.format == "quiet" else live_view() as listener:
            trained = evaluate_shard(
                self.pack,
                self.real,
                shard,
                self.settings,
                test=self.test,
                work=self.work,
                class_names=self.class_names,
                listeners=[listener] if listener else [],
            )
        if self.format == "json":
            _out.emit({"shard": str(shard), "trained": trained})
        elif self.format == "human":
            students = count(trained, "student")
            _out.say(f"shard {shard}: {students} trained; the command without --shard compares")


def _print(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    backbone = evaluation.ledger.backbone
    table = Table(box=None, pad_edge=False)
    for head in ("trained on", "images", "bytes", "+ backbone", "last %", "best %"):
        table.add_column(head, justify="left" if head == "trained on" else "right")
    for row in evaluation.results:
        nbytes = row.mean_bytes
        extra = backbone if row.needs_backbone else 0
        table.add_row(
            printable(row.entry.title),
            str(row.histories[0].images),
            "-" if nbytes is None else size(nbytes),
            "-" if nbytes is None else size(nbytes + extra),
            f"{100 * row.last.mean:.1f} ± {100 * row.last.std:.1f}",
            f"{100 * row.best.mean:.1f} ± {100 * row.best.std:.1f}",
        )
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(table)
    extra_bytes = evaluation.ledger.sent - evaluation.ledger.pack
    if extra_bytes:
        console.print(
            f"the backbone, {size(extra_bytes)}, is not public: it is sent with the pack, and"
            " real images may take as many bytes as both"
        )
    updates = evaluation.facts["updates"]
    console.print(
        f"protocol {evaluation.protocol.name}, {updates} updates,"
        f" {count(evaluation.facts['seeds'], 'seed')};"
        f" decoding took {evaluation.decode_seconds:.1f} s; the pack weighs as much as"
        f" {evaluation.ledger.break_even_marginal} JPEG files"
    )
    for name, value in evaluation.scores().items():
        console.print(f"{name} {value:.3f}")
