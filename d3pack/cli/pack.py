"""`d3pack info`, `verify`, `diff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d3pack.cli import _out
from d3pack.errors import BackboneError, D3MError, InvalidPackError
from d3pack.format import to_plain
from d3pack.system.text import count

if TYPE_CHECKING:
    from d3pack.format.pack import Pack

FormatOption = Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")]


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
    app.command()(info)
    app.command()(verify)
    app.command()(diff)


def info(
    file: Annotated[str, typer.Argument(help="A .d3m file, or an hf:// address.")],
    form: FormatOption = "human",
) -> None:
    """Say what a pack is: identity, classes, backbone, recipe, and where its bytes are.

    Example: d3pack info flowers.d3m
    """
    from d3pack.cli.describe import show

    show(file, form)


def verify(
    files: Annotated[list[str], typer.Argument(help=".d3m files, or hf:// addresses.")],
    form: FormatOption = "human",
    decode: Annotated[
        bool, typer.Option("--decode", help="Rebuild the probes as well and compare the images.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="Where to decode: cpu, cuda.")] = "cpu",
    backbone: Annotated[
        Path | None,
        typer.Option("--backbone", help="Folder of the locked backbone (mirror, air gap)."),
    ] = None,
) -> None:
    """Check every hash and every rule, and with --decode that this machine makes the same images.

    Exit 0: all valid; 3: one is not; 4: a wrong backbone; 5: one is not there.

    Example: d3pack verify flowers.d3m birds.d3m
    """
    from d3pack.format import carried_files

    results: list[dict[str, Any]] = []
    code = 0
    for file in files:
        result: dict[str, Any] = {"file": file, "valid": True}
        try:
            pack = _read(file)
            carried_files(pack)
            result["root"] = pack.root
            if decode:
                if form == "human" and pack.probes is not None:
                    probes = count(len(pack.probes.images), "probe")
                    _out.say(f"rebuilding {probes} of {_out.printable(file)}")
                result["decode"] = _rebuilt(file, pack, device, backbone)
                if result["decode"]["verdict"] == "wrong backbone":
                    code = code or BackboneError.exit_code
        except D3MError as error:
            result |= {"valid": False, "code": error.code, "message": str(error)}
            # An invalid file outweighs a missing one: it is there, and it must not be used.
            code = error.exit_code if code != InvalidPackError.exit_code else code
        results.append(result)
    if form == "json":
        _out.emit(results)
    elif form == "human":
        for result in results:
            name = _out.printable(result["file"])
            if result["valid"]:
                print(f"valid    {name}  {result['root']}")
                if made := result.get("decode"):
                    probes = count(made["probes"], "probe")
                    print(
                        f"decodes  {name}  {made['verdict']}: {probes}, rms {made['rms']}, "
                        f"peak {made['peak']} of 255 levels"
                    )
            else:
                _out.say(f"refused  {name}  {_out.printable(result['message'])}")
    if code:
        raise typer.Exit(code)


def diff(
    a: Annotated[str, typer.Argument(help="A .d3m file, or an hf:// address.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    form: FormatOption = "human",
) -> None:
    """Say in what two packs differ. Exit 0: they are the same; 1: they are not.

    Example: d3pack diff old.d3m new.d3m
    """
    first, second = _read(a), _read(b)
    changes = [] if first.root == second.root else list(_changes(first, second))
    if form == "json":
        _out.emit({"same": not changes, "roots": [first.root, second.root], "changes": changes})
    elif form == "human":
        if not changes:
            print(f"the same pack: {first.root}")
        for change in changes:
            print(_out.printable(f"{change['what']}: {change['a']} -> {change['b']}"))
    if changes:
        raise typer.Exit(1)


def _rebuilt(file: str, pack: Pack, device: str, backbone: Path | None) -> dict[str, Any]:
    from d3pack.decode import Decoder, local_backbone, verify_probes

    with Decoder(pack, device=device, path=backbone or local_backbone(file, pack)) as decoder:
        return verify_probes(pack, decoder).to_json()


def _read(file: str) -> Pack:
    from d3pack.format import read
    from d3pack.hub import local_path

    return read(local_path(file))


def _changes(a: Pack, b: Pack) -> Iterator[dict[str, Any]]:
    gone = [name for name in a.classes if name not in set(b.classes)]
    new = [name for name in b.classes if name not in set(a.classes)]
    if gone or new:
        yield _change("classes", _some(gone) or "-", _some(new) or "-")
    elif a.classes != b.classes:
        yield _change("order of the classes", _some(a.classes), _some(b.classes))
    for what in ("images_per_class", "seed"):
        yield from _unequal(what, a.manifest[what], b.manifest[what])
    for what in ("recipe", "provenance", "optional"):
        yield from _unequal(what, to_plain(a.manifest[what]), to_plain(b.manifest[what]))
    old, fresh = _sections(a), _sections(b)
    for name in sorted((set(old) | set(fresh)) - {"classes", "leaves"}):
        if old.get(name) == fresh.get(name):
            continue
        was, now = (
            f"{part[name][0]}, {part[name][1]:,} bytes" if name in part else "-"
            for part in (old, fresh)
        )
        yield _change(f"section {name}", was, now if was != now else f"{now}, other values")
    if a.classes == b.classes:
        leaves = [pack.sections()["leaves"].tensors["hash"] for pack in (a, b)]
        changed = int((leaves[0] != leaves[1]).any(axis=1).sum())
        if changed:
            yield _change("classes whose values changed", len(a.classes) - changed, changed)


def _sections(pack: Pack) -> dict[str, tuple[str, int, Any]]:
    nbytes = pack.ledger().sections
    return {
        entry["name"]: (
            entry["codec"],
            nbytes.get(entry["name"], 0),
            to_plain({"params": entry["params"], "tensors": entry["tensors"]}),
        )
        for entry in pack.manifest["sections"]
    }


def _unequal(what: str, a: Any, b: Any) -> Iterator[dict[str, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted(set(a) | set(b)):
            yield from _unequal(f"{what}.{name}", a.get(name, "-"), b.get(name, "-"))
    elif a != b:
        yield _change(what, a, b)


def _change(what: str, a: Any, b: Any) -> dict[str, Any]:
    return {"what": what, "a": a, "b": b}


def _some(names: Any) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
