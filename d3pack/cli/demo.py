"""`d3pack demo`: the whole product in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d3pack.cli import _out


def register(app: typer.Typer) -> None:
    """Add `demo`."""
    app.command("demo")(demo)


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for pack, sheet and report.")
    ] = Path("d3pack-demo"),
    form: Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")] = "human",
) -> None:
    """Encode real digits with the embedded backbone, and see what the pack is worth.

    Needs no network and no GPU; takes a few minutes on two cores.

    Example: d3pack demo
    """
    from contextlib import nullcontext

    from d3pack.demo import run_demo
    from d3pack.system.live import live_view

    _out.if_interrupted("run it again and it goes on")
    human = form == "human"
    done = run_demo(
        output,
        view=live_view if human else lambda: nullcontext(lambda event: None),
        say=_out.say if human else lambda text: None,
    )
    if form == "json":
        _out.emit(done.to_json())
    elif human:
        print(done.sentence())
        _out.say(f"{done.seconds:.0f} s; look at {output / 'report.html'}, {output / 'sheet.png'}")
