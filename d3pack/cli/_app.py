"""The command as typer knows it: one module a verb family, light to import."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from d3pack import __version__

app = typer.Typer(
    name="d3pack",
    help="Image-classification datasets as recipes: encode, decode, verify, share.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong call, 3 no valid pack, 4 backbone, 5 not there, "
    "6 the Hub, 7 real images, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

VERBS = (
    "d3pack.cli.pack",
    "d3pack.cli.decode",
    "d3pack.cli.preview",
    "d3pack.cli.encode",
    "d3pack.cli.train",
    "d3pack.cli.eval",
    "d3pack.cli.hub",
    "d3pack.cli.demo",
    "d3pack.cli.cache",
    "d3pack.cli.env",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Image-classification datasets as recipes: encode, decode, verify, share."""
    if version:
        print(__version__)
        raise typer.Exit


for _module in VERBS:
    import_module(_module).register(app)
