"""Write `spec/cli.md`, the reference of the command, from the command itself.

python spec/make_cli.py            # a test fails while the file and the command differ
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from d3pack.cli._command import Flag, all_verbs, flags_of

HEAD = """# The `d3pack` command

Made by `python spec/make_cli.py`; do not edit by hand.

Results go to stdout, everything else to stderr. `--format json` prints one JSON document (`encode`
and `train`: one event a line) that fits [`cli.schema.json`](cli.schema.json). Colours are off where
stdout is not a terminal or `NO_COLOR` is set.

| exit code | meaning |
|---|---|
| 0 | done; `verify`: every file is valid |
| 1 | failed for another reason, said in one line |
| 2 | a wrong call: unknown option, index out of range, contradicting options |
| 3 | not a valid pack |
| 4 | the backbone is missing, changed or refused; `verify --decode`: it makes other images |
| 5 | a file, directory or repository is not there |
| 6 | the Hugging Face Hub or an object store, or the way to it, failed |
| 7 | the real images cannot be used |
| 8 | a shard needs results of other shards first |
| 130 | interrupted; `encode`, `decode`, `train`, `eval` and `demo` go on when called again |
"""
METHODS = ("d3m", "classcond", "minimax", "modes")
VARIANTS = {"encode": [("--method", name) for name in METHODS]}  # settings that depend on a flag


def reference() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, verb in sorted(all_verbs().items()):
        parts.append(f"## d3pack {name}\n\n{prose(verb)}\n")
        sections: dict[str, list[Flag]] = {}
        for args in VARIANTS.get(name, [()]):
            for flag in flags_of(verb, args):
                rows = sections.setdefault(flag.section, [])
                rows += [] if flag in rows else [flag]
        for title, flags in sections.items():
            parts.append(f"### {title}\n\n{table(flags)}\n" if title else f"{table(flags)}\n")
    return "\n".join(parts)


def prose(verb: type) -> str:
    """Return the help text; its example as code."""
    text = inspect.getdoc(verb) or ""
    return re.sub(r"^Example: (.+)$", r"    \1", text, flags=re.MULTILINE)


def table(flags: Sequence[Flag]) -> str:
    """Return one row a flag."""
    rows = [row(flag) for flag in flags]
    return "| option | meaning | default |\n|---|---|---|\n" + "\n".join(rows)


def row(flag: Flag) -> str:
    """Return one line of the table."""
    option = flag.option
    if option.positional:
        return f"| `{flag.label}` | {option.help} |  |"
    names = ", ".join(f"`{name}`" for name in flag.names)
    choices = ", ".join(f"`{choice}`" for choice in option.kind.choices or option.choices)
    limits = choices or option.bounds.text.removeprefix("of ").capitalize()
    meaning = f"{option.help} {limits}." if limits else option.help
    default = "required" if option.required else flag.default and f"`{flag.default}`"
    return f"| {names} | {meaning} | {default} |"


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
