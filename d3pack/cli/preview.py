"""`d3pack preview`: a pack as a picture or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d3pack.cli import _out


def register(app: typer.Typer) -> None:
    """Add `preview`."""
    app.command("preview")(preview)


def preview(
    pack: Annotated[str, typer.Argument(help="A .d3m file or an hf:// address.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .png or .webp sheet, or a whole .html page.")
    ],
    classes: Annotated[int, typer.Option(min=1, help="Classes shown, spread over the pack.")] = 20,
    images: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Directory that holds the backbone, checked by its lock.")
    ] = None,
    form: Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")] = "human",
) -> None:
    """Draw a contact sheet, or a page with images, labels, ledger and recipe.

    Example: d3pack preview cifar10.d3m -o page.html
    """
    from d3pack.errors import NotFoundError, UsageError

    kind = output.suffix.lower()
    if kind not in {".png", ".webp", ".html", ".htm"}:
        raise UsageError(
            f"cannot make a preview of kind {kind or '(none)'!r}", hint="write .png, .webp or .html"
        )
    if not output.parent.is_dir():
        raise NotFoundError(f"{output.parent} is not a directory", hint="create it first")
    import io

    from d3pack import read
    from d3pack.decode import Decoder, beside, verify_probes
    from d3pack.hub import local_path
    from d3pack.preview import render_page, render_sheet, sample
    from d3pack.system import replace_file

    file = local_path(pack)
    opened = read(file)
    home = backbone or beside(file, opened)
    decoder = Decoder(opened, device=device or "cpu", path=home)
    with _out.progress("decoding", quiet=form == "quiet") as progress:
        shown = sample(opened, decoder, classes=classes, images=images, progress=progress)
    name = pack.rsplit("/", 1)[-1]
    if kind in {".png", ".webp"}:
        buffer = io.BytesIO()
        render_sheet(opened, shown, title=name).save(buffer, kind[1:], quality=85)
        data = buffer.getvalue()
    else:
        verdict = "" if opened.probes is None else verify_probes(opened, decoder).verdict
        data = render_page(opened, shown, name=name, verdict=verdict).encode()
    replace_file(output, data)
    if form == "json":
        _out.emit({"output": output.name, "bytes": len(data), "root": opened.root})
    elif form == "human":
        _out.say(f"wrote {output} ({len(data):,} bytes)")
