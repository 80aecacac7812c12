"""Settings written once: frozen dataclasses whose fields carry default, bounds and help.

    @dataclass(frozen=True, slots=True)
    class EncodeSettings:
        images_per_class: int = option(10, "Images per class.", flag="--ipc", ge=1, le=2**20)
        codec: Literal["f16", "i8"] | None = option(None, "How vectors are stored.")

        def __post_init__(self) -> None:
            check(self)

Flags, help, checks, JSON schema, the key of a journal and the reference are made from the fields.
The types are int, float, str, bool, Path, Literal, tuples of these, and each of them or None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from d3pack.errors import UsageError
from d3pack.system.files import expand_user
from d3pack.system.objects import is_url

T = TypeVar("T")
REQUIRED: Any = MISSING  # the default of a setting that has none
_KEY = "d3pack"
_NO_INTEGER = 2**53  # settings are recorded as JSON, whose integers end here for many readers
_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_JSON = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class SettingError(UsageError):
    """A setting has a value that it does not allow."""

    def __init__(self, name: str, value: Any, expected: str) -> None:
        shown = repr(str(value)) if isinstance(value, str | Path) else _shown(value)
        super().__init__(f"invalid {name} {shown}: expected {expected}")
        self.name, self.value, self.expected = name, value, expected

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, Any, str]]:
        return type(self), (self.name, self.value, self.expected)


def _shown(value: Any) -> str:
    """Return the text of a value; Python refuses to write integers of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return "of thousands of digits"


# NamedTuple and not dataclass below: every call of the command imports this module
class Kind(NamedTuple):
    """What an annotation allows."""

    base: type  # tuple for both forms of a tuple
    optional: bool = False
    choices: tuple[Any, ...] = ()
    items: tuple[Kind, ...] = ()  # of a tuple; one of them stands for all if it is repeated
    repeated: bool = False

    @classmethod
    def of(cls, annotation: Any) -> Kind:
        """Read an annotation.

        Raises:
            TypeError: if settings cannot be of that type.
        """
        origin, args = get_origin(annotation), get_args(annotation)
        if origin in (Union, UnionType):
            others = [arg for arg in args if arg is not NoneType]
            if len(others) == 1 and len(args) == 2:
                return cls.of(others[0])._replace(optional=True)
        elif origin is Literal:
            return cls(type(args[0]), choices=args)
        elif origin is tuple:
            repeated = len(args) == 2 and args[1] is Ellipsis
            items = args[:1] if repeated else args
            return cls(tuple, items=tuple(map(cls.of, items)), repeated=repeated)
        elif isinstance(annotation, type):
            return cls(annotation)
        raise TypeError(f"settings cannot be of type {annotation!r}")


class Bounds(NamedTuple):
    """The least and the greatest value of a number; of a tuple's, of each."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def hold(self, value: Any) -> bool:
        """Return whether the value lies between the bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def text(self) -> str:
        """The bounds in words, as "from 1 to 5"; "" if there are none."""
        if self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        parts = [f"{word} {bound}" for word, bound in words.items() if bound is not None]
        if not parts:
            return ""
        return f"{'of ' * parts[0].startswith('at ')}{', '.join(parts)}"


class _TooLargeError(ValueError):
    """An integer cannot be recorded."""


class Option(NamedTuple):
    """One setting: its type, default, bounds and help."""

    name: str
    kind: Kind
    default: Any
    help: str = ""
    flag: str | None = None  # None: made of the name; "": the command line has no such flag
    short: str | None = None
    bounds: Bounds = Bounds()
    choices: tuple[Any, ...] = ()
    parse: Callable[[str], Any] | None = None
    expects: str = ""
    metavar: str | None = None
    group: str = ""
    positional: bool = False
    private: bool = False
    nested: type | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def expected(self) -> str:
        """What a value must be, as an error says it."""
        return self.expects or _expected(self.kind, self.choices, self.bounds)

    def check(self, value: Any, name: str = "") -> Any:
        """Return the value as the setting keeps it: lists as tuples, text as paths.

        Args:
            value: what somebody chose.
            name: how an error calls the setting; else by its own name.

        Raises:
            SettingError: if the value is not allowed.
        """
        try:
            return self._checked(self.kind, value)
        except ValueError as error:
            raise SettingError(name or self.name, value, self._expected_by(error)) from None

    def read(self, text: str | Sequence[str], name: str = "") -> Any:
        """Return the value that a person typed: one word, or several for a tuple.

        Raises:
            SettingError: if the text is no such value.
        """
        try:
            if self.parse is not None:
                value = self._parsed(text)
            else:
                value = _from_text(self.kind, self.choices, text)
            return self._checked(self.kind, value)
        except ValueError as error:
            shown = text if isinstance(text, str) else " ".join(text)
            raise SettingError(name or self.name, shown, self._expected_by(error)) from None

    def _expected_by(self, error: ValueError) -> str:
        too_large = isinstance(error, _TooLargeError)
        return f"an integer within ±{_NO_INTEGER - 1}" if too_large else self.expected

    def _parsed(self, text: str | Sequence[str]) -> Any:
        assert self.parse is not None
        try:
            if self.kind.repeated and not isinstance(text, str):
                return tuple(map(self.parse, text))
            return self.parse(text if isinstance(text, str) else " ".join(text))
        except UsageError as error:
            if self.expects:
                raise ValueError from error
            raise

    def _checked(self, kind: Kind, value: Any) -> Any:
        if value is None and kind.optional:
            return None
        if kind.items:
            if not isinstance(value, list | tuple):
                raise ValueError
            kinds = kind.items * len(value) if kind.repeated else kind.items
            if len(kinds) != len(value):
                raise ValueError
            return tuple(map(self._checked, kinds, value))
        value = _of_type(kind.base, value)
        choices = kind.choices or self.choices
        if choices and value not in choices:
            raise ValueError
        if isinstance(value, int | float) and not self.bounds.hold(value):
            raise ValueError
        if type(value) is int and self.bounds.lt is None and abs(value) >= _NO_INTEGER:
            raise _TooLargeError
        return value


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    short: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] = (),
    parse: Callable[[str], Any] | None = None,
    expected: str = "",
    metavar: str | None = None,
    group: str = "",
    private: bool = False,
) -> Any:
    """Declare a setting; its type is the annotation of the field.

    Args:
        default: value where nobody chooses one; REQUIRED if there is none.
        help: one sentence.
        flag: flag of the command line, if not `--` and the name; "" for none.
        short: a second flag of one letter, as "-o".
        ge: least value, of each number of a tuple.
        gt: value that each must exceed.
        le: greatest value.
        lt: value that each must stay below.
        choices: allowed values, where they are no Literal.
        parse: text to value, where the type does not say it; raises ValueError or UsageError.
        expected: what a value must be, for errors; where type and bounds do not say it.
        metavar: placeholder of the value in help.
        group: heading under which help lists the flag.
        private: whether the value may name a place on this machine; see `plain`.
    """
    return _field(
        default,
        help=help,
        flag=flag,
        short=short,
        bounds=Bounds(ge, gt, le, lt),
        choices=tuple(choices),
        parse=parse,
        expects=expected,
        metavar=metavar,
        group=group,
        private=private,
    )


def argument(
    help: str,
    *,
    default: Any = REQUIRED,
    parse: Callable[[str], Any] | None = None,
    expected: str = "",
    metavar: str | None = None,
) -> Any:
    """Declare a setting that is given by its place on the command line, without a flag."""
    return _field(
        default, help=help, parse=parse, expects=expected, metavar=metavar, positional=True
    )


def same_option(kind: Any, name: str, **changes: Any) -> Any:
    """Declare a setting that another class of settings has, with its flag, bounds and help.

    Args:
        kind: the other class.
        name: its name there.
        changes: arguments of `option` that differ here: `default`, `help`, `flag`, `group`.
    """
    (other,) = (field for field in dataclasses.fields(kind) if field.name == name)
    default, kept = changes.pop("default", other.default), other.metadata[_KEY]
    if unknown := changes.keys() - kept.keys():
        raise TypeError(f"{', '.join(sorted(unknown))} cannot differ")
    return _field(default, **{**kept, "group": "", **changes})


def nested(kind: type, *, group: str = "") -> Any:
    """Declare a field that holds settings of another class; their flags stand among these.

    Args:
        kind: the class, a dataclass of settings that all have defaults.
        group: heading under which help lists its flags.
    """
    return dataclasses.field(
        default_factory=kind, metadata={_KEY: {"nested": kind, "group": group}}
    )


def _field(default: Any, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={_KEY: metadata})


def options_of(kind: Any) -> tuple[Option, ...]:
    """Return the settings of a class, in the order of its fields; other fields are left out."""
    return _options_of(kind)


@cache
def _options_of(kind: Any) -> tuple[Option, ...]:
    declared = [field for field in dataclasses.fields(kind) if _KEY in field.metadata]
    types = get_type_hints(kind) if declared else {}
    return tuple(_option(field, types[field.name]) for field in declared)


def _option(field: dataclasses.Field[Any], annotation: Any) -> Option:
    values = field.metadata[_KEY]
    kind = Kind(values["nested"]) if "nested" in values else Kind.of(annotation)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return Option(field.name, kind, default, **values)


def check(settings: object) -> None:
    """Check every field of a dataclass of settings; call it in `__post_init__`.

    Lists become tuples, text becomes paths where paths are meant, and integers become floats.

    Raises:
        SettingError: naming the first field that has a value of a wrong type or out of bounds.
    """
    for entry in options_of(type(settings)):
        value = getattr(settings, entry.name)
        if value is not entry.default:
            object.__setattr__(settings, entry.name, entry.check(value))


def plain(settings: object, *, private: bool = True) -> dict[str, Any]:
    """Return what differs from the defaults, ready for JSON.

    Args:
        settings: a dataclass of settings.
        private: whether to keep values that may name a place on this machine.
    """
    return _plain(settings, everything=False, private=private)


def all_plain(settings: object, *, private: bool = True) -> dict[str, Any]:
    """Return every value, ready for JSON: what a journal remembers a run by."""
    return _plain(settings, everything=True, private=private)


def _plain(settings: object, *, everything: bool, private: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for entry in options_of(type(settings)):
        value = getattr(settings, entry.name)
        if entry.private and not private:
            continue
        if dataclasses.is_dataclass(value):
            inner = _plain(value, everything=everything, private=private)
            if inner or everything:
                values[entry.name] = inner
        elif everything or value != entry.default:
            values[entry.name] = _to_json(value)
    return values


def from_plain(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return settings from what `plain` or `all_plain` made of them.

    Raises:
        UsageError: if a name is unknown, or a value is not allowed.
    """
    known = {entry.name: entry for entry in options_of(kind)}
    for name in values:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 1)
            raise UsageError(
                f"unknown setting {name!r}: expected {_one_of(sorted(known))}",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
    missing = [name for name, entry in known.items() if entry.required and name not in values]
    if missing:
        raise UsageError(f"missing setting {missing[0]!r}: expected {known[missing[0]].expected}")
    chosen = {}
    for name, value in values.items():
        inner = known[name].nested
        chosen[name] = from_plain(inner, value) if inner else known[name].check(value)
    return kind(**chosen)


def json_schema(kind: type) -> dict[str, Any]:
    """Return the JSON schema of what `plain` makes of settings of this class."""
    entries = options_of(kind)
    return {
        "type": "object",
        "title": kind.__name__,
        "properties": {entry.name: _schema_of(entry) for entry in entries},
        "required": sorted(entry.name for entry in entries if entry.required),
        "additionalProperties": False,
    }


def _schema_of(entry: Option) -> dict[str, Any]:
    if entry.nested:
        return json_schema(entry.nested)
    schema = _schema(entry.kind, entry.choices, entry.bounds)
    schema["description"] = entry.help
    if not entry.required:
        schema["default"] = _to_json(entry.default)
    return schema


def _schema(kind: Kind, choices: tuple[Any, ...], bounds: Bounds) -> dict[str, Any]:
    schema: dict[str, Any]
    if kind.items:
        items = [_schema(item, choices, bounds) for item in kind.items]
        size = {} if kind.repeated else {"minItems": len(items), "maxItems": len(items)}
        same = all(item == items[0] for item in items)
        schema = {"type": "array", **({"items": items[0]} if same else {"prefixItems": items})}
        schema |= size
    elif kind.choices or choices:
        schema = {"enum": list(kind.choices or choices)}
    else:
        schema = {"type": _JSON[kind.base]}
        limits = {
            "minimum": bounds.ge,
            "exclusiveMinimum": bounds.gt,
            "maximum": bounds.le,
            "exclusiveMaximum": bounds.lt,
        }
        schema |= {name: limit for name, limit in limits.items() if limit is not None}
    return {"anyOf": [schema, {"type": "null"}]} if kind.optional else schema


def _of_type(kind: type, value: Any) -> Any:
    """The value, if it is of that type or stands for one without loss."""
    if kind is bool or isinstance(value, bool):
        if kind is not type(value):
            raise ValueError
        return value
    if kind is int and isinstance(value, Integral):
        return int(value)
    if kind is float and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond them
            raise ValueError from None
        if not math.isfinite(number):
            raise ValueError
        return number
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind):
        raise ValueError
    return value


def _from_text(kind: Kind, choices: tuple[Any, ...], text: str | Sequence[str]) -> Any:
    if kind.items:
        texts = [text] if isinstance(text, str) else list(text)
        kinds = kind.items * len(texts) if kind.repeated else kind.items
        if len(kinds) != len(texts):
            raise ValueError
        return tuple(_from_text(k, choices, t) for k, t in zip(kinds, texts, strict=True))
    if not isinstance(text, str):
        (text,) = text
    for choice in kind.choices or choices:
        if str(choice) == text:
            return choice
    if kind.base is bool:
        if text.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[text.lower()]
    if kind.base is Path:
        if is_url(text):  # else a folder "s3:" would be made here
            raise ValueError
        return expand_user(text)
    return parse_integer(text) if kind.base is int else kind.base(text)


def parse_integer(text: str) -> int:
    """Return the integer of decimal digits; `int` reads " +1_0" as well."""
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise ValueError
    return int(text)


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_to_json, value))
    return str(value) if isinstance(value, Path) else value


def _expected(kind: Kind, choices: tuple[Any, ...], bounds: Bounds) -> str:
    if kind.items:
        parts = [_expected(item, choices, bounds) for item in kind.items]
        if kind.repeated:
            return f"values that are each {parts[0]}"
        if len(set(parts)) == 1:
            return f"{len(parts)} values that are each {parts[0]}"
        return f"{len(parts)} values: {', '.join(parts)}"
    if kind.choices or choices:
        return _one_of(list(map(str, kind.choices or choices)))
    noun = _NOUNS.get(kind.base, f"a {kind.base.__name__}")
    return f"{noun} {bounds.text}".rstrip()


def _one_of(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
