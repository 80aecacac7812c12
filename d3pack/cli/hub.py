"""`d3pack pull` and `d3pack push`: packs on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d3pack.cli import _out

if TYPE_CHECKING:
    from d3pack.hub import Parcel, Pushed

FormatOption = Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")]


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
    app.command()(pull)
    app.command()(push)


def pull(
    address: Annotated[
        str, typer.Argument(help="hf://datasets/org/name[@rev]/file.d3m[#sha256=ROOT], org/name.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to put the pack. [its name, here]")
    ] = None,
    cache_only: Annotated[
        bool, typer.Option("--cache-only", help="Fill the Hub cache, write nothing here.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another file.")] = False,
    backbone: Annotated[
        bool, typer.Option("--backbone", help="Also fetch the backbone, by its lock.")
    ] = False,
    signed: Annotated[
        bool, typer.Option("--signed", help="Refuse a pack without a signature.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key (PEM) that must have signed.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option(help="Who must have signed, as Sigstore knows them.")
    ] = None,
    issuer: Annotated[str | None, typer.Option(help="Who vouches for that identity (URL).")] = None,
    form: FormatOption = "human",
) -> None:
    """Fetch a pack from the Hub, verify every hash, and put it here.

    Example: d3pack pull hf://datasets/org/imnet-d3m/imnet.d3m
    """
    from d3pack import hub

    trust = hub.Trust(key, identity, issuer, signed)
    pulled = hub.pull(
        address,
        output=None if cache_only else output or Path(),
        overwrite=force,
        trust=trust,
        with_backbone=backbone,
    )
    result = {
        "address": str(pulled.address),
        "root": pulled.pack.root,
        "bytes": len(pulled.data),
        "path": str(pulled.path),
        "signature": pulled.signature,
        "backbone": str(pulled.backbone) if pulled.backbone else None,
    }
    if form == "json":
        _out.emit(result)
    elif form == "quiet":
        print(result["path"])
    else:
        print(f"{_out.printable(str(result['path']))}  {len(pulled.data):,} bytes, verified")
        print(f"from      {pulled.address}")
        print(f"signature {pulled.signature}")


def push(
    file: Annotated[Path, typer.Argument(help="The .d3m file to publish.")],
    repo: Annotated[str, typer.Argument(help="Dataset repository: org/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="The repository must be, or is made, private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to. [main]")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show everything that would be sent; send nothing.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the pack, as cc-by-4.0.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What the real images were, and their licence.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--eval", help="evaluation.json of `d3pack eval`. [PACK.eval/]")
    ] = None,
    preview: Annotated[
        Literal["decode", "probes", "none"],
        typer.Option(help="Images for the viewer: decode, probes or none."),
    ] = "decode",
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the preview. [40; 12 above 128 pixels]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the file there. [as here]")] = None,
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign it: with --key, else by Sigstore's login.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option("--key", help="Private key (PEM) to sign with.")
    ] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Replace a README.md that is not ours.")
    ] = False,
    backbone: Annotated[
        Path | None, typer.Option(help="Directory that holds the backbone, checked by its lock.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the preview is decoded: cpu, cuda, ...")
    ] = "cpu",
    form: FormatOption = "human",
) -> None:
    """Publish a pack in one commit, with card, preview and metadata; then read it back.

    Example: d3pack push imnet.d3m org/imnet-d3m --license cc-by-4.0 --dry-run
    """
    from d3pack import hub

    settings = hub.PushSettings(
        licence=licence,
        source=source,
        evaluation=record,
        preview=preview,
        images=images,
        backbone=backbone,
        device=device,
        sign=sign,
        key=key,
        name=name,
        private=private,
        revision=revision,
        pr=pr,
        replace_card=replace_card,
    )
    if not dry_run:
        hub.check_login()
    quiet = form == "quiet" or preview != "decode"
    with _out.progress("decoding the preview", quiet=quiet) as progress:
        parcel = hub.prepare_push(file, repo, settings, progress=progress)
    if dry_run:
        _show(parcel, form)
        return
    _report(hub.send_push(parcel, settings), form)


def _show(parcel: Parcel, form: _out.Format) -> None:
    if form == "quiet":
        return
    rows = [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in parcel.files.items()
    ]
    if form == "json":
        value: dict[str, Any] = {
            "address": str(parcel.address),
            "root": parcel.pack.root,
            "message": parcel.message,
            "files": rows,
            "notes": list(parcel.notes),
            "texts": {path: data.decode() for path, data in parcel.files.items() if path in _TEXTS},
        }
        _out.emit(value)
        return
    for note in parcel.notes:
        _out.say(note)
    print(f"would commit to {parcel.address.repo}: {parcel.message}")
    for row in rows:
        print(f"{row['bytes']:>12,}  {row['sha256']}  {row['path']}")
    for path in _TEXTS:
        print(f"\n--- {path}\n{parcel.files[path].decode().rstrip()}")


_TEXTS = (".gitattributes", "README.md", "croissant.json")


def _report(done: Pushed, form: _out.Format) -> None:
    for note in done.notes:
        _out.say(note)
    if form == "json":
        _out.emit(
            {
                "address": str(done.address),
                "commit": done.address.revision,
                "root": done.address.root,
                "url": done.web,
                "files": list(done.sent),
                "notes": list(done.notes),
            }
        )
    elif form == "quiet":
        print(done.address)
    else:
        print(f"pushed and read back: {done.web}")
        print(f"open with {done.address}")
