"""`d3pack cache ls|rm|verify`: the decoded images that D3MDataset keeps on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from d3pack.cli import _out
from d3pack.errors import NotFoundError, UsageError

FormatOption = Annotated[_out.Format, typer.Option("--format", help="human, json or quiet.")]
FolderOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Another cache than d3pack's own.")
]
KeysArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[STORE]...", help="Stores by key or pack root, or how one begins."),
]


def register(app: typer.Typer) -> None:
    """Add `cache ls`, `cache rm` and `cache verify`."""
    cache = typer.Typer(
        name="cache",
        help="Decoded images kept on disk.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    cache.command("ls")(ls)
    cache.command("rm")(rm)
    cache.command("verify")(verify)
    app.add_typer(cache)


def ls(cache_dir: FolderOption = None, form: FormatOption = "human") -> None:
    """List the stores of decoded images, the longest unused first: these are evicted first.

    Example: d3pack cache ls
    """
    found = [_facts(entry) for entry in _entries(cache_dir)]
    if form == "json":
        _out.emit(found)
        return
    for fact in found:
        if form == "quiet":
            print(fact["key"])
            continue
        if not fact["root"]:
            print(
                f"{fact['key'][:12]}  {'not of this version':<41} {_megabytes(fact['bytes']):>10}  "
                f"{fact['age_days']:5.1f} days{'  in use' if fact['in_use'] else ''}"
            )
            continue
        print(
            f"{fact['key'][:12]}  pack {fact['root'][:12]}  "
            f"{fact['decoded']:>9,} of {fact['images']:<9,} {_megabytes(fact['bytes']):>10}  "
            f"{fact['age_days']:5.1f} days{'  in use' if fact['in_use'] else ''}"
        )
    if form == "human":
        total = _megabytes(sum(fact["bytes"] for fact in found))
        _out.say(f"{len(found)} stores, {total} in {_home(cache_dir)}")


def rm(
    stores: KeysArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every store.")] = False,
    cache_dir: FolderOption = None,
    form: FormatOption = "human",
) -> None:
    """Remove stores; those that a running process uses stay. Exit 1 if one stayed.

    Example: d3pack cache rm 3f6a9c
    """
    from d3pack.dataset import remove_store

    if everything == bool(stores):
        raise UsageError("cache rm needs stores or --all", hint="d3pack cache ls names them")
    results = []
    for entry in _chosen(cache_dir, stores):
        results.append({**_facts(entry), "removed": remove_store(entry.path)})
        if form == "human":
            done = "removed" if results[-1]["removed"] else "in use, left alone"
            print(f"{entry.path.name[:12]}  {done}")
    if form == "json":
        _out.emit(results)
    if not all(result["removed"] for result in results):
        raise typer.Exit(1)


def verify(
    stores: KeysArgument = None,
    cache_dir: FolderOption = None,
    form: FormatOption = "human",
) -> None:
    """Check every decoded image; bad ones are dropped and decoded anew. Exit 1 if there were any.

    A store of another user is left alone, which is exit 1 as well.

    Example: d3pack cache verify
    """
    from d3pack.dataset import verify_store

    results, skipped = [], False
    for entry in _chosen(cache_dir, stores):
        try:
            bad = verify_store(entry)
        except PermissionError:
            _out.say(f"{entry.path.name[:12]}  of another user, left alone")
            skipped = True
            continue
        results.append({**_facts(entry), "bad": bad})
        if form == "human":
            said = f"{entry.decoded:,} images, {len(bad)} bad"
            print(f"{entry.path.name[:12]}  {said if entry.identity else 'not of this version'}")
    if form == "json":
        _out.emit(results)
    if skipped or any(result["bad"] for result in results):
        raise typer.Exit(1)


def _home(cache_dir: Path | None) -> Path:
    from d3pack.backbones import cache_home

    if cache_dir is not None and not cache_dir.is_dir():
        raise NotFoundError(f"there is no folder {cache_dir}", hint="--cache-dir names one")
    return cache_home() if cache_dir is None else cache_dir


def _entries(cache_dir: Path | None) -> list[Any]:
    from d3pack.dataset import list_stores

    return list_stores(_home(cache_dir))


def _chosen(cache_dir: Path | None, stores: list[str] | None) -> list[Any]:
    """The stores that are named, or all; a name that fits none is refused before any is touched."""
    found = _entries(cache_dir)
    if not stores:
        return found
    for name in stores:
        if not any(_fits(entry, name) for entry in found):
            raise NotFoundError(
                f"there is no store {_out.printable(name)!r}", hint="d3pack cache ls names them"
            )
    return [entry for entry in found if any(_fits(entry, name) for name in stores)]


def _fits(entry: Any, name: str) -> bool:
    root = entry.identity.root if entry.identity else ""
    return bool(name) and (entry.path.name.startswith(name) or root.startswith(name))


def _facts(entry: Any) -> dict[str, Any]:
    from d3pack.dataset import store_in_use

    what = entry.identity
    return {
        "key": entry.path.name,
        "root": what.root if what else "",
        "numerics": what.numerics if what else "",
        "device": what.device if what else "",
        "software": what.software if what else "",
        "images": what.images if what else 0,
        "decoded": entry.decoded,
        "shape": list(what.shape) if what else [],
        "bytes": entry.on_disk,
        "age_days": round(max(0.0, time.time() - entry.used) / 86400, 3),
        "in_use": store_in_use(entry.path),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
