"""A method's own settings: out of `EncodeOptions.extra`, into a frozen dataclass of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from d3pack.errors import UsageError

T = TypeVar("T")
_YES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_settings(kind: type[T], method: str, extra: Mapping[str, Any]) -> T:
    """`extra` as a `kind`; words (out of --set) become what the defaults are."""
    known = {f.name: f.default for f in fields(kind) if f.default is not MISSING}  # type: ignore[arg-type]
    values = {}
    for name, value in extra.items():
        if name not in known:
            raise UsageError(
                f"{method} has no setting {name!r}", hint=f"it has {', '.join(sorted(known))}"
            )
        wanted = type(known[name])
        try:
            values[name] = _YES[str(value).lower()] if wanted is bool else wanted(value)
        except (KeyError, ValueError, TypeError):
            raise UsageError(f"{name} is {value!r}, not {_article(wanted)}") from None
    return kind(**values)


def need_between(settings: object, low: float, high: float, *names: str) -> None:
    """Refuse settings outside of a range, and what is no number at all."""
    for name in names:
        value = getattr(settings, name)
        if not low <= value <= high:
            raise UsageError(f"{name} is {value}", hint=f"it lies between {low:g} and {high:g}")


def _article(kind: type[Any]) -> str:
    return {int: "a whole number", float: "a number", bool: "yes or no"}.get(kind, "a word")
