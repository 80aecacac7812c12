"""`d3pack decode`: a pack as image files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d3pack.cli import _out

if TYPE_CHECKING:
    from d3pack.decode.export import Progress


def register(app: typer.Typer) -> None:
    """Add this family's verb."""
    app.command("decode")(decode)


def decode(
    pack: Annotated[str, typer.Argument(help="A .d3m file, or an hf:// address.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")],
    to: Annotated[
        str, typer.Option("--to", help="folder (ImageFolder), webdataset, parquet or npz.")
    ] = "folder",
    image: Annotated[str, typer.Option("--image", help="png or webp.")] = "png",
    quality: Annotated[
        int | None, typer.Option("--quality", help="Lossy webp, 1 to 100; without it: lossless.")
    ] = None,
    shard: Annotated[int, typer.Option("--shard", help="Images of one shard.")] = 1024,
    classes: Annotated[
        str | None, typer.Option("--classes", help='Names or numbers: "cat,dog", "0,5", "3-7".')
    ] = None,
    ipc: Annotated[
        int | None, typer.Option("--ipc", help="Images per class: the first (best) so many.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    fast: Annotated[
        str | None,
        typer.Option(
            "--fast",
            help="Faster, other pixels: a list of bf16, channels_last, fused_attention, compile,"
            " tiny_vae; or all for the first three.",
        ),
    ] = None,
    tiny_vae: Annotated[
        Path | None, typer.Option("--tiny-vae", help="Folder of a small autoencoder, for --fast.")
    ] = None,
    backbone: Annotated[
        Path | None,
        typer.Option("--backbone", help="Folder of the locked backbone (mirror, air gap)."),
    ] = None,
    format: Annotated[
        _out.Format, typer.Option("--format", help="human, json or quiet.")
    ] = "human",
) -> None:
    """Rebuild the images of a pack. An interrupted call goes on where it stopped."""
    from d3pack.decode import Decoder
    from d3pack.decode.export import Plan, export
    from d3pack.decode.names import chosen
    from d3pack.errors import UsageError
    from d3pack.format import read

    plan = Plan(to, image, quality, shard)
    plan.check()
    opened = read(_local(pack))
    wanted = chosen(opened.classes, classes)
    count = opened.images_per_class if ipc is None else ipc
    if not 1 <= count <= opened.images_per_class:
        raise UsageError(f"--ipc {count}: the pack has {opened.images_per_class} images per class")
    mode = "exact" if fast is None and tiny_vae is None else "fast"
    switches = None if fast in (None, "all") else [part.strip() for part in fast.split(",")]
    decoder = Decoder(
        opened, device=device, mode=mode, switches=switches, tiny_vae=tiny_vae, path=backbone
    )
    how = decoder.describe()
    if format != "quiet":
        switched = f" ({', '.join(how['switches'])})" if how["switches"] else ""
        _out.say(
            _out.printable(
                f"{how['mode']}{switched} on {how['device']}, {how['dtype']}, backbone"
                f" {how['backbone']}, {how['sampler']} {how['steps']} steps"
            )
        )
    with _progress(format == "quiet") as progress:
        done = export(decoder, out, wanted, count, plan, progress)
    if format == "json":
        _out.emit(
            {
                "images": done.images,
                "made": done.made,
                "seconds": round(done.seconds, 3),
                "images_per_second": round(done.rate, 2),
                "out": str(out),
                "root": opened.root,
                "decoder": how,
            }
        )
    elif format == "human":
        kept = f", {done.images - done.made:,} were there" if done.made < done.images else ""
        print(_out.printable(f"{done.images:,} images in {out} ({done.rate:.1f} a second{kept})"))


def _local(file: str) -> Path:
    if file.startswith("hf://"):
        from d3pack.hub import local_path

        return local_path(file)
    return Path(file)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar with images/s and the time left, on stderr; a terminal is not needed."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")
        first: int | None = None

        def update(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            seconds = bar.tasks[0].elapsed or 0.0
            rate = f"{(done - first) / seconds:.1f} images/s" if seconds and done > first else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield update
