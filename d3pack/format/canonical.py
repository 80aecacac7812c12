"""Canonical JSON: one spelling for one value, so that texts can be compared and hashed.

Keys are sorted by code point, there is no white space, text is ASCII with `\\uXXXX` escapes.
Integers lie within +-(2**53 - 1). Reals are the shortest decimal that reads back as the same
binary64, always with a point or an exponent; NaN and infinity are refused. At most 32 levels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from d3pack.errors import InvalidPackError

MAX_DEPTH = 32
MAX_INT = 2**53 - 1
_SCALARS = (str, int, float, type(None))


def dumps(value: Any) -> str:
    """Return the canonical spelling of a value made of JSON types, mappings and sequences."""
    return dumps_plain(to_plain(value))


def dumps_plain(value: Any) -> str:
    """Return the canonical spelling of a value that comes from `loads` or `to_plain`."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def loads(text: str, name: str) -> Any:
    """Parse JSON and refuse what canonical JSON cannot hold; errors call the text `name`."""
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_real, parse_int=_integer)
        return to_plain(value)
    except RecursionError:
        raise InvalidPackError(
            f"{name}: nested deeper than {MAX_DEPTH} levels", code="E_JSON"
        ) from None
    except ValueError as error:
        raise InvalidPackError(f"{name}: {error}", code="E_JSON") from None


def spelled_defaults(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return which items are spelled as their default: 0 is not False, 1 is not 1.0."""
    common = sorted(set(value) & set(defaults))
    return [name for name in common if dumps_plain(value[name]) == dumps_plain(defaults[name])]


def drop_defaults(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items that are not spelled as their default."""
    spelled = set(spelled_defaults(value, defaults))
    return {name: item for name, item in value.items() if name not in spelled}


def to_plain(value: Any, depth: int = 0) -> Any:
    """Return a copy made of dict, list, str, int, float, bool and None.

    Raises:
        InvalidPackError: the value holds something else, or is out of bounds.
    """
    kind = type(value)
    if kind is str:
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise InvalidPackError("a string holds half of a surrogate pair", code="E_JSON")
        return value
    if kind is bool or value is None:
        return value
    if kind is int:
        if abs(value) > MAX_INT:
            raise InvalidPackError(
                "an integer is beyond 2**53 - 1", code="E_JSON", hint="write it as a string"
            )
        return value
    if kind is float:
        if not math.isfinite(value):
            raise InvalidPackError("a number is NaN or infinite", code="E_JSON")
        return value
    if depth >= MAX_DEPTH:
        raise InvalidPackError(f"nested deeper than {MAX_DEPTH} levels", code="E_JSON")
    if isinstance(value, (list, tuple)):
        return [to_plain(item, depth + 1) for item in value]
    if isinstance(value, (dict, Mapping)):
        if not all(isinstance(key, str) for key in value):
            raise InvalidPackError("an object key is not a string", code="E_JSON")
        return {to_plain(str(key)): to_plain(item, depth + 1) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        return to_plain(value.item(), depth)
    raise InvalidPackError(f"JSON has no type for {kind.__name__}", code="E_JSON")


class FrozenDict(dict[str, Any]):
    """A dict that cannot change. Unlike a mapping proxy it pickles and prints as JSON."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this mapping is immutable")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """Return an immutable copy: mappings become FrozenDict, sequences tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(freeze, value))
    # scalars are recognised first, because `isinstance(..., Mapping)` is slow
    if isinstance(value, dict) or (not isinstance(value, _SCALARS) and isinstance(value, Mapping)):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 17:
        raise ValueError("an integer is beyond 2**53 - 1")
    return int(text)
