"""A method makes a pack out of a source. New ones are plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from d3pack.encode.options import EncodeOptions
from d3pack.errors import UsageError
from d3pack.format.pack import Pack
from d3pack.sources import Source
from d3pack.system.events import Events
from d3pack.system.journal import Journal

GROUP = "d3pack.methods"
BACKBONE = "backbone"  # a folder of the journal: a method that trains a backbone leaves it there
_BUILT_IN = {
    "d3m": "d3pack.encode.methods.d3m.method:D3M",
    "classcond": "d3pack.encode.methods.classcond.method:ClassCond",
    "minimax": "d3pack.encode.methods.minimax.method:Minimax",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a method works with. Everything it wants to keep goes into the journal."""

    source: Source
    options: EncodeOptions
    plan: Plan
    journal: Journal
    events: Events
    device: str
    cache: Path  # teachers live here, across runs


class Plan(Protocol):
    """What a method is going to do, before it does anything costly."""

    def to_json(self) -> Mapping[str, Any]:
        """Every resolved setting; part of the journal's key, so without times and paths."""
        ...

    def lines(self) -> list[str]:
        """The same for a person."""
        ...


class Method(Protocol):
    """`plan` is cheap and refuses what cannot work; `encode` goes on where a killed run stopped."""

    name: str

    def plan(self, source: Source, options: EncodeOptions, device: str) -> Plan: ...

    def estimate(self, source: Source, plan: Plan, options: EncodeOptions) -> Mapping[str, Any]:
        """Seconds by stage and bytes of the pack, for --dry-run."""
        ...

    def encode(self, run: Run) -> Pack: ...


@cache
def methods() -> Mapping[str, str]:
    """Methods by name, as "module:class": ours and those of the group "d3pack.methods"."""
    found = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return {**found, **_BUILT_IN}


def open_method(name: str) -> Method:
    """The method of that name, ready to use."""
    if name not in methods():
        raise UsageError(
            f"there is no method {name!r}",
            hint=f"known: {', '.join(sorted(methods()))}; others come with a plugin",
        )
    module_name, _, class_name = methods()[name].partition(":")
    method: Method = getattr(import_module(module_name), class_name)()
    return method
