"""`d3pack eval`: what a pack is worth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d3pack.cli import _out
from d3pack.errors import SourceError

if TYPE_CHECKING:
    from d3pack.evaluate.evaluation import EvalOptions, Evaluation
    from d3pack.evaluate.real import RealImages
    from d3pack.format.pack import Pack
    from d3pack.sources import Source


def register(app: typer.Typer) -> None:
    """Add `eval`."""
    app.command("eval")(evaluate)


def evaluate(
    pack: Annotated[str, typer.Argument(help="A .d3m file or an hf:// address.")],
    real: Annotated[
        str,
        typer.Option(
            "--real", help="Real images: a folder with train/ and test/, or the training images."
        ),
    ],
    test: Annotated[
        str | None, typer.Option("--test", help="Real test images, where --real has no test/.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="quick, dc, eccv24, minimax-hard, rded-soft or rded-soft-small."),
    ] = "quick",
    seeds: Annotated[int, typer.Option(min=1, help="Students of each kind.")] = 3,
    student: Annotated[
        str | None, typer.Option(help="Another student: convnet3, resnetap10, hf:vit, ...")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels at which students work.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="random, jpeg, webp, sheet, avif, names, collages, whole, none; repeatable.",
        ),
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Also train on all real images.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="train, or a transformers classifier: chooses collages, relabels (rded-soft)."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="ipc=1,5,10 codec=f16,i4 labels=none,top2 vectors=1,4; repeatable."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where finished students are kept. [PACK.eval]")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write one HTML page here.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="Table from folder names to class names.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Directory that holds the backbone, checked by its lock.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start even when it takes hours.")] = False,
    form: Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")] = "human",
) -> None:
    """Train students on a pack and on real images of equal weight, and compare them.

    Example: d3pack eval cifar10.d3m --real cifar10 --report cifar10.html
    """
    from d3pack import read
    from d3pack.decode import beside
    from d3pack.errors import NotFoundError, UsageError
    from d3pack.evaluate import presets
    from d3pack.evaluate.evaluation import DEFAULT_BASELINES, EvalOptions
    from d3pack.evaluate.workdir import Workdir, write_json
    from d3pack.hub import local_path
    from d3pack.sources import open_source

    chosen = presets.find(preset)
    if report is not None and report.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"--report {report.name} is no page", hint="write a name with .html")
    if report is not None and not report.parent.is_dir():
        raise NotFoundError(f"{report.parent} is not a directory", hint="create it first")
    wanted = tuple(baseline) if baseline else DEFAULT_BASELINES
    wanted = () if wanted == ("none",) else wanted
    wanted += ("whole",) if whole and "whole" not in wanted else ()
    path = local_path(pack)
    opened = read(path)
    training = open_source(real, class_names=class_names, split="train")
    testing = _testing(test or real, class_names)
    if training.fingerprint() == testing.fingerprint():
        raise UsageError(
            "the training images and the test images are the same files",
            hint="give a folder with train/ and test/, or other images with --test",
        )
    options = EvalOptions(
        chosen,
        seeds=seeds,
        student=student,
        size=size,
        baselines=wanted,
        device=_device(device),
        backbone=backbone or beside(path, opened),
        teacher=teacher,
        agreed=yes,
    )
    from d3pack.evaluate.evaluation import choose_size
    from d3pack.evaluate.real import RealImages

    side = choose_size(chosen, size, testing)
    train_real = RealImages(training, opened.classes, side, "training")
    test_real = RealImages(testing, opened.classes, round(side * chosen.test_resize), "test")
    home = Workdir(work or Path(f"{Path(path).stem}.eval"))
    _out.if_interrupted(f"run the same command again and it goes on ({home.path})")
    result = _run(opened, train_real, test_real, options, home, sweep or [], quiet=form == "quiet")
    data = result.to_json()
    write_json(home.path / "evaluation.json", data)
    if report is not None:
        from d3pack.evaluate.report import render
        from d3pack.system import replace_file

        replace_file(report, render(result, name=Path(path).name).encode())
    if form == "json":
        _out.emit(data)
    elif form == "human":
        _table(result)
        _out.say(f"all figures: {home.path / 'evaluation.json'}")
        if report is not None:
            _out.say(f"report: {report}")


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


def _device(wanted: str | None) -> str:
    import torch

    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _run(
    pack: Pack,
    train: RealImages,
    test: RealImages,
    options: EvalOptions,
    home: Any,
    axes: list[str],
    *,
    quiet: bool,
) -> Evaluation:
    from d3pack.evaluate import evaluation, sweep

    wanted = sweep.parse(axes)
    clock = _Clock(quiet)
    return evaluation.evaluate(
        pack,
        train,
        test,
        options,
        home,
        sweep=wanted,
        report=clock.say,
        progress=clock.step,
    )


class _Clock:
    """Says what happens, and how long the student at work still takes."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._began = self._shown = 0.0

    def say(self, text: str) -> None:
        if not self._quiet:
            _out.say(text)

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 1:
            self._began = self._shown = now
        elif not self._quiet and now - self._shown > 15 and done < total:
            self._shown = now
            left = (now - self._began) / (done - 1) * (total - done)
            _out.say(f"  update {done:,} of {total:,}, {left:.0f} s left")


def _table(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    from d3pack.system.text import count, size

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
        f"preset {result.preset.name}, {updates} updates,"
        f" {count(result.facts['seeds'], 'seed')};"
        f" decoding took {result.decode_seconds:.1f} s; the pack weighs as much as"
        f" {result.ledger.break_even_marginal} JPEG files"
    )
    for name, value in result.scores().items():
        console.print(f"{name} {value:.3f}")
