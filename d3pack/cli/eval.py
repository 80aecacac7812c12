"""`d3pack eval`: what a pack is worth."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d3pack.cli import _out
from d3pack.errors import D3MError

if TYPE_CHECKING:
    from d3pack.evaluate import Evaluation


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
    protocol: Annotated[
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
    from d3pack.evaluate import EvalSettings, report_path, write_report
    from d3pack.evaluate import evaluate as run
    from d3pack.system import live_view

    if report is not None:
        report_path(report)
    _out.if_interrupted("run the same command again and it goes on")
    with nullcontext() if form == "quiet" else live_view() as listener:
        try:
            settings = EvalSettings(
                protocol=protocol,
                seeds=seeds,
                student=student,
                size=size,
                whole=whole,
                teacher=teacher,
                sweep=tuple(sweep or ()),
                device=device,
                backbone=backbone,
                allow_long=yes,
                **({"baselines": tuple(baseline)} if baseline else {}),
            )
            result = run(
                pack,
                real,
                settings,
                test=test,
                work=work,
                class_names=class_names,
                listeners=[listener] if listener else [],
            )
        except D3MError as error:
            raise _with_flags(error) from error
    if report is not None:
        write_report(result, report)
    if form == "json":
        _out.emit(result.to_json())
    elif form == "human":
        _table(result)
        _out.say(f"all figures: {result.work / 'evaluation.json'}")
        if report is not None:
            _out.say(f"report: {report}")


def _with_flags(error: D3MError) -> D3MError:
    """The error, naming flags where the library names arguments."""
    names = {"allow_long=True": "--yes", "size=": "--size ", "test=": "--test"}
    names |= {"class_names": "--class-names", "a teacher:": "--teacher:"}
    for name, flag in names.items():
        error.hint = error.hint.replace(name, flag)
    return error


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
        extra = backbone if row.needs_backbone else 0
        table.add_row(
            row.entry.title,
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
            f"the backbone, {size(beside)}, is not public: it is sent with the pack, and real"
            " images may take as many bytes as both"
        )
    updates = result.facts["updates"]
    console.print(
        f"protocol {result.protocol.name}, {updates} updates,"
        f" {count(result.facts['seeds'], 'seed')};"
        f" decoding took {result.decode_seconds:.1f} s; the pack weighs as much as"
        f" {result.ledger.break_even_marginal} JPEG files"
    )
    for name, value in result.scores().items():
        console.print(f"{name} {value:.3f}")
