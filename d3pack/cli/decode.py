"""`d3pack decode`: a pack as image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d3pack.cli import _out

_LARGE, _CHUNK = 400_000_000, 1 << 22


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
    """Rebuild the images of a pack. An interrupted call goes on where it stopped.

    Example: d3pack decode imnet.d3m -o imnet/
    """
    from d3pack.decode import Decoder, ExportSettings, export_images, local_backbone, select_classes
    from d3pack.errors import NotFoundError, UsageError
    from d3pack.hub import load

    settings = ExportSettings(to, image, quality, shard)  # type: ignore[arg-type]
    opened = load(pack)
    wanted = select_classes(opened.classes, classes)
    count = opened.images_per_class if ipc is None else ipc
    if not 1 <= count <= opened.images_per_class:
        raise UsageError(f"--ipc {count}: the pack has {opened.images_per_class} images per class")
    if tiny_vae is not None and not tiny_vae.is_dir():
        raise NotFoundError(f"there is no directory {tiny_vae}", hint="--tiny-vae names one")
    exact = fast is None and tiny_vae is None
    switches = None if fast in (None, "all") else [part.strip() for part in fast.split(",")]
    _out.if_interrupted("run the same command again and it goes on")
    decoder = Decoder(
        opened,
        device=device,
        numerics="exact" if exact else "fast",
        switches=switches,
        tiny_vae=tiny_vae,
        path=backbone or local_backbone(pack, opened),
        progress=None if format == "quiet" else _checking,
    )
    how = decoder.describe()
    if format != "quiet":
        switched = f" ({', '.join(how['switches'])})" if how["switches"] else ""
        _out.say(
            _out.printable(
                f"{how['numerics']}{switched} on {how['device']}, {how['dtype']}, backbone"
                f" {how['backbone']}, {how['sampler']} {how['steps']} steps"
            )
        )
    with _out.progress("decoding", quiet=format == "quiet") as progress:
        done = export_images(
            decoder, out, settings, classes=wanted, images_per_class=count, progress=progress
        )
    if format == "json":
        _out.emit(
            {
                "images": done.images,
                "made": done.decoded,
                "seconds": round(done.seconds, 3),
                "images_per_second": round(done.rate, 2),
                "out": str(out),
                "root": opened.root,
                "decoder": how,
            }
        )
    elif format == "human":
        kept = f", {done.images - done.decoded:,} were there" if done.decoded < done.images else ""
        print(_out.printable(f"{done.images:,} images in {out} ({done.rate:.1f} a second{kept})"))


def _checking(path: str, done: int, size: int) -> None:
    """Hashing gigabytes takes a while, once: say so."""
    if size >= _LARGE and (done == size or done <= _CHUNK):
        what = "checked" if done == size else "checking"
        _out.say(_out.printable(f"{what} {path}, {size / 1e9:.1f} GB"))
