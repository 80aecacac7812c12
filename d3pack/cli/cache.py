"""Decoded images that D3MDataset keeps on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option
from d3pack.errors import NotFoundError, UsageError
from d3pack.system import argument, option


def cache_option() -> Any:
    """Declare which cache is meant."""
    return option(None, "Another cache than d3pack's own.")


def stores_argument() -> Any:
    """Declare which stores are meant."""
    return argument(
        "Stores by key or pack root, or how one begins.", default=(), metavar="[STORE]..."
    )


@dataclass(frozen=True, slots=True)
class Ls:
    """List the stores of decoded images, those longest unused first: they are evicted first.

    Example: d3pack cache ls
    """

    cache_dir: Path | None = cache_option()
    format: Format = format_option()

    def run(self) -> None:
        """Print one line a store."""
        stores = [_facts(entry) for entry in _entries(self.cache_dir)]
        if self.format == "json":
            _out.emit(stores)
            return
        for store in stores:
            _out.show(store["key"] if self.format == "quiet" else _line(store))
        if self.format == "human":
            total = _megabytes(sum(store["bytes"] for store in stores))
            _out.say(f"{len(stores)} stores, {total} in {_home(self.cache_dir)}")


@dataclass(frozen=True, slots=True)
class Rm:
    """Remove stores; those that a running process uses stay. Exit 1 if one stayed.

    Example: d3pack cache rm 3f6a9c
    """

    stores: tuple[str, ...] = stores_argument()
    everything: bool = option(False, "Remove every store.", flag="--all")
    cache_dir: Path | None = cache_option()
    format: Format = format_option()

    def run(self) -> int:
        """Remove one store after the other."""
        from d3pack.dataset import remove_store

        if self.everything == bool(self.stores):
            raise UsageError("cache rm needs stores or --all", hint="d3pack cache ls names them")
        results = []
        for entry in _chosen(self.cache_dir, self.stores):
            results.append({**_facts(entry), "removed": remove_store(entry.path)})
            if self.format == "human":
                outcome = "removed" if results[-1]["removed"] else "in use, left alone"
                _out.show(f"{entry.path.name[:12]}  {outcome}")
        if self.format == "json":
            _out.emit(results)
        return 0 if all(result["removed"] for result in results) else 1


@dataclass(frozen=True, slots=True)
class Verify:
    """Check every decoded image; bad ones are dropped and decoded again. Exit 1 if there were any.

    A store of another user is left alone, which is exit 1 as well.

    Example: d3pack cache verify
    """

    stores: tuple[str, ...] = stores_argument()
    cache_dir: Path | None = cache_option()
    format: Format = format_option()

    def run(self) -> int:
        """Check one store after the other."""
        from d3pack.dataset import verify_store

        results, skipped = [], False
        for entry in _chosen(self.cache_dir, self.stores):
            try:
                bad = verify_store(entry)
            except PermissionError:
                _out.say(f"{entry.path.name[:12]}  of another user, left alone")
                skipped = True
                continue
            results.append({**_facts(entry), "bad": bad})
            if self.format == "human":
                outcome = f"{entry.decoded:,} images, {len(bad)} bad"
                text = outcome if entry.identity else "not of this version"
                _out.show(f"{entry.path.name[:12]}  {text}")
        if self.format == "json":
            _out.emit(results)
        return 1 if skipped or any(result["bad"] for result in results) else 0


def _line(store: dict[str, Any]) -> str:
    if store["root"]:
        what = f"pack {store['root'][:12]}  {store['decoded']:>9,} of {store['images']:<9,}"
    else:
        what = f"{'not of this version':<41}"
    in_use = "  in use" if store["in_use"] else ""
    size, age = _megabytes(store["bytes"]), store["age_days"]
    return f"{store['key'][:12]}  {what} {size:>10}  {age:5.1f} days{in_use}"


def _home(cache_dir: Path | None) -> Path:
    from d3pack.backbones import cache_home

    if cache_dir is not None and not cache_dir.is_dir():
        raise NotFoundError(f"there is no folder {cache_dir}", hint="--cache-dir names one")
    return cache_home() if cache_dir is None else cache_dir


def _entries(cache_dir: Path | None) -> list[Any]:
    from d3pack.dataset import list_stores

    return list_stores(_home(cache_dir))


def _chosen(cache_dir: Path | None, names: tuple[str, ...]) -> list[Any]:
    """The stores that are named, or all; an unknown name is refused before any is touched."""
    entries = _entries(cache_dir)
    for name in names:
        if not any(_fits(entry, name) for entry in entries):
            raise NotFoundError(f"there is no store {name!r}", hint="d3pack cache ls names them")
    return [e for e in entries if not names or any(_fits(e, name) for name in names)]


def _fits(entry: Any, name: str) -> bool:
    root = entry.identity.root if entry.identity else ""
    return bool(name) and (entry.path.name.startswith(name) or root.startswith(name))


def _facts(entry: Any) -> dict[str, Any]:
    from d3pack.dataset import store_in_use

    identity = entry.identity
    return {
        "key": entry.path.name,
        "root": identity.root if identity else "",
        "numerics": identity.numerics if identity else "",
        "device": identity.device if identity else "",
        "software": identity.software if identity else "",
        "images": identity.images if identity else 0,
        "decoded": entry.decoded,
        "shape": list(identity.shape) if identity else [],
        "bytes": entry.on_disk,
        "age_days": round(max(0.0, time.time() - entry.used) / 86400, 3),
        "in_use": store_in_use(entry.path),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
