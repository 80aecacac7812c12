"""`d3pack info`, `verify`, `diff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from d3pack.canonical import plain
from d3pack.cli import _out
from d3pack.errors import BackboneError, D3MError, InvalidPackError
from d3pack.format import read
from d3pack.pack import Ledger, Pack

WIDTH = 80
FormatOption = Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")]


def register(app: typer.Typer) -> None:
    """Add this family's verbs."""
    app.command()(info)
    app.command()(verify)
    app.command()(diff)


def info(
    file: Annotated[str, typer.Argument(help="A .d3m file, or an hf:// address.")],
    format: FormatOption = "human",
) -> None:
    """Say what a pack is: identity, classes, backbone, recipe, and where its bytes are."""
    pack = _outline(file)
    if format == "json":
        _out.emit(_summary(pack))
    elif format == "quiet":
        print(pack.root)
    else:
        for line in (*_describe(pack, file), "", *_ledger(pack.ledger())):
            print(line)


def verify(
    files: Annotated[list[str], typer.Argument(help=".d3m files, or hf:// addresses.")],
    format: FormatOption = "human",
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
    """
    results: list[dict[str, Any]] = []
    code = 0
    for file in files:
        result: dict[str, Any] = {"file": file, "valid": True}
        try:
            pack = read(_local(file))
            result["root"] = pack.root
            if decode:
                result["decode"] = _rebuilt(pack, device, backbone)
                if result["decode"]["verdict"] == "wrong backbone":
                    code = code or BackboneError.exit_code
        except D3MError as error:
            result |= {"valid": False, "code": error.code, "message": str(error)}
            # An invalid file outweighs a missing one: it is there, and it must not be used.
            code = error.exit_code if code != InvalidPackError.exit_code else code
        results.append(result)
    if format == "json":
        _out.emit(results)
    elif format == "human":
        for result in results:
            name = _out.printable(result["file"])
            if result["valid"]:
                print(f"valid    {name}  {result['root']}")
                if made := result.get("decode"):
                    print(
                        f"decodes  {name}  {made['verdict']}: {made['probes']} probes, rms "
                        f"{made['rms']}, peak {made['peak']} of 255 levels"
                    )
            else:
                print(f"refused  {name}  {_out.printable(result['message'])}")
    if code:
        raise typer.Exit(code)


def diff(
    a: Annotated[str, typer.Argument(help="A .d3m file, or an hf:// address.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    format: FormatOption = "human",
) -> None:
    """Say in what two packs differ. Exit 0: they are the same; 1: they are not."""
    first, second = read(_local(a)), read(_local(b))
    changes = [] if first.root == second.root else list(_changes(first, second))
    if format == "json":
        _out.emit({"same": not changes, "roots": [first.root, second.root], "changes": changes})
    elif format == "human":
        if not changes:
            print(f"the same pack: {first.root}")
        for change in changes:
            print(_out.printable(f"{change['what']}: {change['a']} -> {change['b']}"))
    if changes:
        raise typer.Exit(1)


def _rebuilt(pack: Pack, device: str, backbone: Path | None) -> dict[str, Any]:
    from d3pack.decode import Decoder, verify_probes

    with Decoder(pack, device=device, path=backbone) as decoder:
        return verify_probes(pack, decoder).to_json()


def _local(file: str) -> Path:
    from d3pack.hub import local_path

    return local_path(file)


def _outline(file: str) -> Pack:
    """All that `info` tells: of a remote pack only the first bytes are read, and it says so."""
    from d3pack.hub import is_address, remote_info

    return remote_info(file).outline if is_address(file) else read(file)


def _summary(pack: Pack) -> dict[str, Any]:
    ledger = pack.ledger()
    manifest: dict[str, Any] = plain(pack.manifest)
    sections = {entry.pop("name"): entry for entry in manifest.pop("sections")}
    return {
        **manifest,
        "classes": list(pack.classes),
        "images": len(pack),
        "sections": sections,
        "ledger": {
            "sections": dict(ledger.sections),
            "total": ledger.total,
            "per_class": ledger.per_class,
            "per_image": ledger.per_image,
            "backbone": ledger.backbone,
            "teacher": ledger.teacher,
            "everything": ledger.everything,
        },
    }


def _describe(pack: Pack, file: str) -> Iterator[str]:
    recipe, backbone, prompts = pack.recipe, pack.recipe.backbone, pack.prompts
    modes, vectors, width = prompts.params["shape"]
    yield _clip(f"{_out.printable(file)}  d3m 1.{pack.minor}")
    yield _row("root", pack.root)
    yield _row("classes", f"{len(pack.classes):,}: " + ", ".join(pack.classes[:20]))
    height, breadth = recipe.size
    yield _row(
        "images", f"{len(pack):,}, {pack.images_per_class:,} a class, {height} x {breadth} pixels"
    )
    yield _row("backbone", f"{backbone.kind}, {backbone.repo or 'a directory'}")
    yield _row("", f"revision {backbone.revision}")
    yield _row(
        "",
        f"{_count(len(backbone.files), 'file')}, {_size(backbone.nbytes)},"
        f" licence {backbone.licence}",
    )
    yield _row(
        "recipe",
        f"{recipe.sampler}, {len(recipe.sigmas) - 1} steps from sigma {recipe.sigmas[0]:.4g}, "
        f"guidance {recipe.guidance:g}",
    )
    yield _row("", f"{recipe.dtype}, groups of {recipe.group}, {recipe.noise} noise")
    yield _row("", f"template {recipe.template!r}")
    yield _row(
        "prompts",
        f"{prompts.codec}, {_count(modes, 'mode')} of {_count(vectors, 'vector')} of {width} "
        f"values, error {prompts.params['error']['rms']:.2%}",
    )
    how = (
        "derived"
        if pack.picks is None
        else f"curated, {_count(pack.picks.itemsize, 'byte')} an image"
    )
    yield _row("seeds", f"{how}, from {pack.seed:016x}")
    if pack.labels is not None:
        params = pack.labels.params
        text = f"{pack.labels.codec}, error {params['error']['mean']:.2g}"
        if pack.labels.codec == "topk":
            text += f", top {params['k']} at {params['bits']} bits, "
            text += f"kept mass {params['kept']['mean']:.2%}, at least {params['kept']['min']:.2%}"
        yield _row("labels", text)
    if pack.adapter is not None:
        table = pack.adapter.params["table"]
        yield _row("adapter", f"{pack.adapter.codec}, {_count(len(table), 'tensor')}")
    if pack.probes is not None:
        count, _, height, breadth = pack.probes.images.shape
        yield _row("probes", f"{_count(count, 'image')} of {height} x {breadth} pixels")
    if pack.optional:
        yield _row("optional", ", ".join(sorted(pack.optional)) + " (unknown here, preserved)")
    if pack.provenance:
        yield _row("provenance", ", ".join(sorted(pack.provenance)))


def _ledger(ledger: Ledger) -> Iterator[str]:
    yield _clip(f"{'bytes':<12}{'':>22}{'a class':>16}{'an image':>16}")
    for name, nbytes in sorted(ledger.sections.items(), key=lambda item: (-item[1], item[0])):
        yield _bytes(_out.printable(name), nbytes, ledger)
    yield _bytes("file", ledger.total, ledger)
    yield f"{'+ backbone':<12}{ledger.backbone:>22,}"
    if ledger.teacher is not None:
        yield f"{'+ teacher':<12}{ledger.teacher:>22,}"
    yield f"{'everything':<12}{ledger.everything:>22,}"


def _bytes(name: str, nbytes: int, ledger: Ledger) -> str:
    a_class, an_image = nbytes / ledger.classes, nbytes / ledger.images
    return _clip(f"{name:<12}{nbytes:>22,}{a_class:>16,.1f}{an_image:>16,.2f}")


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
        yield from _unequal(what, plain(a.manifest[what]), plain(b.manifest[what]))
    old, fresh = _sections(a), _sections(b)
    for name in sorted(set(old) | set(fresh) - {"classes", "leaves"}):
        if name in ("classes", "leaves") or old.get(name) == fresh.get(name):
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
    return {
        entry["name"]: (
            entry["codec"],
            pack.ledger().sections.get(entry["name"], 0),
            plain({"params": entry["params"], "tensors": entry["tensors"]}),
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


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.2f} {unit}"


def _row(name: str, text: str) -> str:
    return _clip(f"  {name:<12}{_out.printable(text)}")


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
