"""From a frozen dataclass with a `run` method to a command of click.

A verb is a file of this package. `info.py` holds one such dataclass, which is `d3pack info`; a file
that holds several is a group, as `d3pack cache ls`. The docstring of the class is the help, and its
fields, declared with d3pack.system.settings, are the flags: no list names the verb again. What it
prints as JSON stands in `spec/make_cli_schema.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import click
from click.exceptions import Exit, NoArgsIsHelpError

from d3pack.cli import _completion
from d3pack.errors import D3MError, InvalidPackError, UsageError
from d3pack.system import Option, SettingError, options_of

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _TextType = click.ParamType[str]
else:
    _TextType = click.ParamType  # which takes no type before click 8.4

HELP = {"help_option_names": ["-h", "--help"]}
EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong call, 3 no valid pack, 4 backbone, 5 not there, "
    "6 the Hub or a store, 7 real images, 8 other shards first, 130 interrupted."
)
FIRST = """\
d3pack: image-classification datasets as recipes of a few kilobytes.

Three things to do first:

  1. See it work, offline, in a few minutes:
     d3pack demo

  2. Make a pack of your images, a folder for each class:
     d3pack encode photos/ -o photos.d3m

  3. Train on it, in Python:
     from d3pack import D3MDataset
     dataset = D3MDataset("photos.d3m")  # a PyTorch dataset of images and labels

d3pack --help lists all commands."""
_CHOSEN = "d3pack.chosen"
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


class Verb(Protocol):
    """What a class of a verb has beside its fields."""

    def run(self) -> int | None:
        """Do the work, print the result, and return the exit code; None is 0."""
        ...


def chosen(by: str, find: Callable[[str], type | None]) -> Any:
    """Declare a field whose class of settings depends on the value of another field.

    Args:
        by: name of that other field, which is declared before this one.
        find: its value to the class of settings; None where there are none.
    """
    return dataclasses.field(default=None, metadata={_CHOSEN: (by, find)})


class Flag(NamedTuple):
    """A setting as the command line shows it."""

    path: tuple[str, ...]  # names of the fields that lead to it
    option: Option
    section: str

    @property
    def label(self) -> str:
        """How errors call it: the flag, or the place of an argument."""
        option = self.option
        if option.positional:
            return option.metavar or option.name.upper()
        return option.flag or f"--{option.name.replace('_', '-')}"

    @property
    def names(self) -> list[str]:
        """All ways to write the flag; a switch that is on by default is turned off by it."""
        name = self.label
        if self.option.kind.base is bool and self.option.default is True:
            name = f"--no-{name[2:]}"
        return [self.option.short, name] if self.option.short else [name]

    @property
    def default(self) -> str:
        """The default, where there is something to show."""
        value = self.option.default
        if self.option.required or isinstance(value, bool) or value in (None, "", ()):
            return ""
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    @property
    def limits(self) -> str:
        """What help says about a value beside the help of the setting."""
        parts = [f"default: {self.default}"] if self.default else []
        if self.option.required and not self.option.positional:
            parts.append("required")
        if bounds := self.option.bounds.text.removeprefix("of "):
            parts.append(bounds)
        return ", ".join(parts)

    @property
    def metavar(self) -> str:
        """Placeholder of the value."""
        option, kind = self.option, self.option.kind
        if option.metavar or option.positional:
            return self.label if option.positional else str(option.metavar)
        items = kind.items or (kind,)
        choices = items[0].choices or option.choices
        if choices:
            return f"[{'|'.join(map(str, choices))}]"
        return " ".join(_METAVARS.get(item.base, item.base.__name__.upper()) for item in items)

    def parameter(self, number: int) -> click.Parameter:
        """Return what click needs to know; it leaves the text as it was typed."""
        option, kind = self.option, self.option.kind
        size = len(kind.items) if kind.items and not kind.repeated and not option.parse else 1
        text = _Text(kind.items[0].choices if kind.items else kind.choices or option.choices)
        if option.positional:
            nargs = -1 if kind.repeated else size
            return click.Argument(
                [f"p{number}"], type=text, nargs=nargs, required=False, metavar=self.label
            )
        names = [f"p{number}", *self.names]
        help = f"{option.help}  [{self.limits}]" if self.limits else option.help
        if kind.base is bool:
            return click.Option(names, is_flag=True, help=help)
        return click.Option(
            names, type=text, nargs=size, multiple=kind.repeated, help=help, metavar=self.metavar
        )

    def read(self, text: Any) -> Any:
        """Return the value of what was typed."""
        if self.option.kind.base is bool and not self.option.positional:
            return self.option.default is not True
        if self.option.kind.base is str and text[:2] in {"~/", "~\\"}:
            text = os.path.expanduser(text)  # in front of = a shell leaves it as it is
        return self.option.read(text, self.label)


class _Text(_TextType):
    """Text as it was typed; its completions are the choices, or else files."""

    name = "text"

    def __init__(self, choices: Sequence[Any]) -> None:
        self.choices = [str(choice) for choice in choices]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return what may stand here."""
        from click.shell_completion import CompletionItem

        if not self.choices:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(c) for c in self.choices if c.startswith(incomplete)]


def flags_of(verb: type, args: Sequence[str] = ()) -> Iterator[Flag]:
    """Yield the flags of a verb, those of nested settings among them.

    Args:
        verb: its class.
        args: what was typed after the verb; decides which class a `chosen` field has.
    """
    yield from _flags(verb, (), "")
    for name, kind, section in _chosen(verb, args):
        for flag in _flags(kind, (name,), section):
            title = f"{section}: {flag.option.group}" if flag.option.group else section
            yield flag._replace(section=title)


def _flags(kind: type, path: tuple[str, ...], section: str) -> Iterator[Flag]:
    for option in options_of(kind):
        if option.nested:
            yield from _flags(option.nested, (*path, option.name), option.group or section)
        elif option.flag != "":
            title = option.group[:1].upper() + option.group[1:]
            yield Flag((*path, option.name), option, title or section)


def _chosen(verb: type, args: Sequence[str]) -> Iterator[tuple[str, type, str]]:
    """Fields with a class that depends on another field: name, class, heading."""
    for field in dataclasses.fields(verb):
        if _CHOSEN in field.metadata:
            by, find = field.metadata[_CHOSEN]
            (flag,) = [flag for flag in _flags(verb, (), "") if flag.path[-1] == by]
            value = _typed(args, flag.names) or flag.option.default
            kind = find(value)
            if kind is not None:
                yield field.name, kind, f"Settings of {flag.label} {value}"


def _typed(args: Sequence[str], names: Sequence[str]) -> str | None:
    """The value that a flag has among arguments which are not parsed yet."""
    value = None
    for word, following in zip_longest(args, args[1:]):
        if word == "--":
            break
        name, equals, rest = word.partition("=")
        if name in names:
            value = rest if equals else following
    return value


class _Command(click.Command):
    """A verb; its help lists the flags section by section."""

    def __init__(self, name: str, verb: type, args: Sequence[str]) -> None:
        self.flags = list(flags_of(verb, args))
        self.nested = {(kind[0],): kind[1] for kind in _chosen(verb, args)}
        self.verb = verb
        super().__init__(
            name,
            params=[flag.parameter(number) for number, flag in enumerate(self.flags)],
            help=inspect.getdoc(verb),
            context_settings=HELP,
        )

    def invoke(self, ctx: click.Context) -> int | None:
        """Build the verb of what was typed, and run it."""
        values = {}
        for number, flag in enumerate(self.flags):
            text = ctx.params[f"p{number}"]
            if text not in (None, (), False):
                values[flag.path] = flag.read(text)
            elif flag.option.required:
                raise UsageError(f"missing {flag.label}: expected {flag.option.expected}")
        try:
            verb: Verb = self._built(self.verb, (), values)
            return verb.run()
        except SettingError as error:
            labels = {flag.option.name: flag.label for flag in self.flags}
            label = labels.get(error.name, error.name)
            raise SettingError(label, error.value, self._with_flags(error.expected)) from None
        except InvalidPackError:  # names fields of a pack, not settings
            raise
        except D3MError as error:
            error.args = tuple(self._with_flags(str(text)) for text in error.args)
            error.hint = self._with_flags(error.hint)
            raise

    def _with_flags(self, text: str) -> str:
        """Return a message with flags where the library names arguments of Python."""
        for flag in self.flags:
            name, label = flag.option.name, flag.label
            text = re.sub(rf"\b{name}=True\b", label, text)
            text = re.sub(rf"\b{name}=(?=[\w\"'])", f"{label} ", text)
            bare = rf"(?<!['./])\b{name}{'=?' if '_' in name else '='}(?!\w|'|\.\w)"
            text = re.sub(bare, label, text)  # and not in a value or a file's name
        return text

    def _built(self, kind: type, path: tuple[str, ...], values: dict[tuple[str, ...], Any]) -> Any:
        chosen = {keys[-1]: value for keys, value in values.items() if keys[:-1] == path}
        for option in options_of(kind):
            if option.nested:
                chosen[option.name] = self._built(option.nested, (*path, option.name), values)
        if not path:
            for place, settings in self.nested.items():
                chosen[place[-1]] = self._built(settings, place, values)
        return kind(**chosen)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments, options, and options with a heading of their own."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for flag, param in zip(self.flags, self.params, strict=True):
            if flag.option.positional:
                sections.setdefault("Arguments", []).append((flag.label, flag.option.help))
            elif (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(flag.section or "Options", []).append(record)
        help_option = self.get_help_option(ctx)
        if help_option is not None and (record := help_option.get_help_record(ctx)):
            sections.setdefault("Options", []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class _Group(click.Group):
    """Commands that are imported when they are asked for."""

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        find: Callable[[str, Sequence[str]], click.Command],
        **how: Any,
    ) -> None:
        super().__init__(name, no_args_is_help=True, context_settings=HELP, **how)
        self._names, self._find = names, find

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; those of files by their docstrings, without importing them."""
        find = self._find
        if find is _find:
            self._find = lambda name, args: click.Command(name, help=_help_of(name))
        try:
            super().format_commands(ctx, formatter)
        finally:
            self._find = find

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        return self._find(cmd_name, ()) if cmd_name in self._names else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; an unknown one is told its nearest."""
        name, rest = args[0], args[1:]
        if name in self._names:
            return name, self._find(name, rest), rest
        if ctx.resilient_parsing:
            return None, None, rest
        if name.startswith("-"):
            self.parse_args(ctx, args)
        raise UsageError(f"no command {name!r}", hint=_near(name, self._names))


def verb_names() -> list[str]:
    """Return the names of all verbs and groups: the files of this package."""
    files = os.listdir(os.path.dirname(__file__))
    verbs = (file[:-3] for file in files if file.endswith(".py") and file[0] != "_")
    return sorted(verb.replace("_", "-") for verb in verbs)


def _help_of(name: str) -> str:
    """Return the help of a file: the docstring of its class or, of a group, its own."""
    path = os.path.join(os.path.dirname(__file__), f"{name.replace('-', '_')}.py")
    if not os.path.isfile(path):
        return _find(name, ()).help or ""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(part, ast.FunctionDef) and part.name == "run" for part in node.body)
    ]
    return ast.get_docstring(classes[0] if len(classes) == 1 else tree) or ""


def verbs_of(name: str) -> dict[str, type]:
    """Return the classes of a file by what is typed for them, as "cache ls"."""
    module = import_module(f"d3pack.cli.{name.replace('-', '_')}")
    classes = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "run")
    ]
    if len(classes) == 1:
        return {name: classes[0]}
    return {f"{name} {kind.__name__.lower()}": kind for kind in classes}


def all_verbs() -> dict[str, type]:
    """Return the class of every verb by what is typed for it."""
    return {typed: verb for name in verb_names() for typed, verb in verbs_of(name).items()}


def _find(name: str, args: Sequence[str]) -> click.Command:
    verbs = verbs_of(name)
    if name in verbs:
        return _Command(name, verbs[name], args)

    def find(part: str, args: Sequence[str]) -> click.Command:
        return _Command(part, verbs[f"{name} {part}"], args)

    parts = [verb.partition(" ")[2] for verb in verbs]
    return _Group(name, parts, find, help=inspect.getdoc(import_module(f"d3pack.cli.{name}")))


def _root() -> click.Group:
    def version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            from d3pack import __version__

            print(__version__)
            ctx.exit()

    return _Group(
        _completion.PROGRAM,
        verb_names(),
        _find,
        help="Image-classification datasets as recipes: encode, decode, verify, share.",
        epilog=EXIT_CODES,
        params=[
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=version,
                help="Print the version.",
            ),
            *_completion.options(),
        ],
    )


def execute(args: Sequence[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        D3MError: if it fails.
    """
    root = _root()
    if instruction := os.environ.get(_completion.VARIABLE):
        return _completion.complete(root, instruction)
    if not args:
        print(FIRST)
        return 0
    try:
        with root.make_context(_completion.PROGRAM, list(args)) as ctx:
            return root.invoke(ctx) or 0
    except Exit as leave:
        return leave.exit_code
    except NoArgsIsHelpError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except click.NoSuchOption as error:
        hint = f"did you mean {error.possibilities[0]!r}?" if error.possibilities else ""
        raise UsageError(f"no option {error.option_name!r}", hint=hint) from None
    except click.UsageError as error:
        text = error.format_message().rstrip(".")
        raise UsageError(text[:1].lower() + text[1:]) from None


def _near(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(names)}"
