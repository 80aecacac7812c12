"""`d3pack eval`: what a pack is worth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3pack.cli import _out
from d3pack.cli._fields import (
    Format,
    backbone_option,
    device_option,
    expand,
    format_option,
    pack_argument,
)
from d3pack.errors import NotFoundError, SourceError, UsageError
from d3pack.system import REQUIRED, option

if TYPE_CHECKING:
    from d3pack.evaluate.evaluation import Evaluation
    from d3pack.evaluate.workdir import Workdir
    from d3pack.sources import Source


@dataclass(frozen=True, slots=True)
class Eval:
    """Train students on a pack and on real images of equal size in bytes, and compare them.

    Example: d3pack eval cifar10.d3m --real cifar10 --report cifar10.html
    """

    pack: str = pack_argument()
    real: str = option(
        REQUIRED,
        "Real images: a folder with train/ and test/, or the training images.",
        parse=expand,
    )
    test: str | None = option(None, "Real test images, where --real has no test/.", parse=expand)
    protocol: str = option(
        "quick", "quick, dc, eccv24, minimax-hard, rded-soft or rded-soft-small."
    )
    seeds: int = option(3, "Students of each kind.", ge=1)
    student: str | None = option(None, "Another student: convnet3, resnetap10, hf:vit, ...")
    size: int | None = option(None, "Pixels at which students work.")
    baseline: tuple[str, ...] = option(
        (), "random, jpeg, webp, sheet, avif, names, collages, whole, none; repeatable."
    )
    whole: bool = option(False, "Also train on all real images.")
    teacher: str | None = option(
        None,
        "train, or a transformers classifier: chooses collages, relabels (rded-soft).",
        parse=expand,
    )
    sweep: tuple[str, ...] = option(
        (), "ipc=1,5,10 codec=f16,i4 labels=none,top2 vectors=1,4; repeatable."
    )
    work: Path | None = option(None, "Where finished students are kept. [PACK.eval]")
    report: Path | None = option(None, "Write one HTML page here.")
    class_names: Path | None = option(None, "Table from folder names to class names.")
    device: str | None = device_option()
    backbone: str | None = backbone_option()
    yes: bool = option(False, "Start even when it takes hours.")
    format: Format = format_option()

    def run(self) -> None:
        """Train the students, keep the figures and print them."""
        from d3pack.evaluate.workdir import Workdir, write_json
        from d3pack.hub import local_path

        report = self.report
        if report is not None and report.suffix.lower() not in {".html", ".htm"}:
            raise UsageError(f"invalid --report {report.name!r}: expected a name with .html")
        if report is not None and not report.parent.is_dir():
            raise NotFoundError(f"{report.parent} is not a directory", hint="create it first")
        path = local_path(self.pack)
        home = Workdir(self.work or Path(f"{Path(path).stem}.eval"))
        result = self._evaluated(path, home)
        data = result.to_json()
        write_json(home.path / "evaluation.json", data)
        if report is not None:
            from d3pack.evaluate.report import render
            from d3pack.system import replace_file

            replace_file(report, render(result, name=Path(path).name).encode())
        if self.format == "json":
            _out.emit(data)
        elif self.format == "human":
            _table(result)
            _out.say(f"all figures: {home.path / 'evaluation.json'}")
            if report is not None:
                _out.say(f"report: {report}")

    def _evaluated(self, path: Path, home: Workdir) -> Evaluation:
        from d3pack.decode import local_backbone
        from d3pack.evaluate import presets, sweep
        from d3pack.evaluate.evaluation import (
            DEFAULT_BASELINES,
            EvalOptions,
            choose_size,
            evaluate,
        )
        from d3pack.evaluate.real import RealImages
        from d3pack.format import read
        from d3pack.sources import open_source

        protocol = presets.find(self.protocol)
        pack = read(path)
        training = open_source(self.real, class_names=self.class_names, split="train")
        testing = _testing(self.test or self.real, self.class_names)
        if training.fingerprint() == testing.fingerprint():
            raise UsageError(
                "the training images and the test images are the same files",
                hint="give a folder with train/ and test/, or other images with --test",
            )
        baselines = self.baseline or DEFAULT_BASELINES
        baselines = () if baselines == ("none",) else baselines
        baselines += ("whole",) if self.whole and "whole" not in baselines else ()
        options = EvalOptions(
            protocol,
            seeds=self.seeds,
            student=self.student,
            size=self.size,
            baselines=baselines,
            device=_device(self.device),
            backbone=self.backbone or local_backbone(path, pack),
            teacher=self.teacher,
            agreed=self.yes,
        )
        side = choose_size(protocol, self.size, testing)
        train = RealImages(training, pack.classes, side, "training")
        test = RealImages(testing, pack.classes, round(side * protocol.test_resize), "test")
        _out.if_interrupted(f"run the same command again and it goes on ({home.path})")
        axes = sweep.parse(self.sweep)
        clock = _Clock(self.format == "quiet")
        return evaluate(
            pack, train, test, options, home, sweep=axes, report=clock.say, progress=clock.step
        )


def _testing(where: str, class_names: Path | None) -> Source:
    """The part of a source to test on, however it is called; all of a source without parts."""
    from d3pack.sources import open_source

    refused = []
    for split in ("test", "val", "dev"):
        try:
            return open_source(where, class_names=class_names, split=split)
        except SourceError as error:
            refused.append(error)
    raise refused[0]


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


class _Clock:
    """Says what happens, and how long the student at work still takes."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._began = self._last = 0.0

    def say(self, text: str) -> None:
        if not self._quiet:
            _out.say(text)

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 1:
            self._began = self._last = now
        elif not self._quiet and now - self._last > 15 and done < total:
            self._last = now
            left = (now - self._began) / (done - 1) * (total - done)
            _out.say(f"  update {done:,} of {total:,}, {left:.0f} s left")


def _table(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    from d3pack.system import count, size

    backbone = result.ledger.backbone
    table = Table(box=None, pad_edge=False)
    for head in ("trained on", "images", "bytes", "+ backbone", "last %", "best %"):
        table.add_column(head, justify="left" if head == "trained on" else "right")
    for row in result.results:
        nbytes = row.mean_bytes
        extra = backbone if row.arm.needs_backbone else 0
        table.add_row(
            row.arm.title,
            str(row.histories[0].images),
            "-" if nbytes is None else size(nbytes),
            "-" if nbytes is None else size(nbytes + extra),
            f"{100 * row.last.mean:.1f} ± {100 * row.last.std:.1f}",
            f"{100 * row.best.mean:.1f} ± {100 * row.best.std:.1f}",
        )
    console = Console(stderr=True, highlight=False)
    console.print(table)
    beside = result.ledger.sent - result.ledger.pack
    if beside:
        console.print(
            f"the backbone, {size(beside)}, has no public home: it travels with the pack, and real"
            " images may take as many bytes as both"
        )
    updates = result.facts["updates"]
    console.print(
        f"protocol {result.preset.name}, {updates} updates,"
        f" {count(result.facts['seeds'], 'seed')};"
        f" decoding took {result.decode_seconds:.1f} s; the pack weighs as much as"
        f" {result.ledger.break_even_marginal} JPEG files"
    )
    for name, value in result.scores().items():
        console.print(f"{name} {value:.3f}")
