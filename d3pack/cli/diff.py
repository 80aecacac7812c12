"""`d3pack diff`: in what two packs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, pack_argument

if TYPE_CHECKING:
    from d3pack.format import Pack


@dataclass(frozen=True, slots=True)
class Diff:
    """Print in what two packs differ. Exit 0: they are the same; 1: they are not.

    Example: d3pack diff old.d3m new.d3m
    """

    a: str = pack_argument()
    b: str = pack_argument("Another one.")
    format: Format = format_option()

    def run(self) -> int:
        """Compare the packs section by section."""
        from d3pack.hub import load

        first, second = load(self.a), load(self.b)
        changes = [] if first.root == second.root else list(_changes(first, second))
        if self.format == "json":
            _out.emit({"same": not changes, "roots": [first.root, second.root], "changes": changes})
        elif self.format == "human":
            if not changes:
                _out.show(f"the same pack: {first.root}")
            for change in changes:
                _out.show(f"{change['what']}: {change['a']} -> {change['b']}")
        return 1 if changes else 0


def _changes(a: Pack, b: Pack) -> Iterator[dict[str, Any]]:
    from d3pack.format import DEFAULTS, to_plain

    gone = [name for name in a.classes if name not in set(b.classes)]
    new = [name for name in b.classes if name not in set(a.classes)]
    if gone or new:
        yield _change("classes", _some(gone) or "-", _some(new) or "-")
    elif a.classes != b.classes:
        yield _change("order of the classes", _some(a.classes), _some(b.classes))
    for what in ("images_per_class", "seed", "provenance", "optional"):
        one, other = (to_plain({**DEFAULTS, **pack.manifest}[what]) for pack in (a, b))
        yield from _unequal(what, one, other)
    yield from _unequal("recipe", a.recipe.to_json(), b.recipe.to_json())
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
    from d3pack.format import to_plain

    ledger, stored = pack.ledger().sections, pack.sections()
    return {
        name: (
            codec,
            ledger.get(name, 0),
            (to_plain(params), [array.tobytes() for array in stored[name].tensors.values()]),
        )
        for name, codec, params, *_ in pack.manifest["sections"]
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
