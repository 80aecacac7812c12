"""Write `spec/cli.md`, the reference of the command, from the command itself.

python spec/make_cli.py            # a test fails while the file and the command differ
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from d3pack.cli import app

HEAD = """# The `d3pack` command

Made by `python spec/make_cli.py`; do not edit by hand.

Results go to stdout, everything else to stderr. `--format json` prints one JSON document (`encode`
and `train`: one event a line) that fits [`cli.schema.json`](cli.schema.json). Colours are off where
stdout is no terminal or `NO_COLOR` is set.

| exit code | meaning |
|---|---|
| 0 | done; `verify`: every file is valid |
| 1 | failed for another reason, said in one line |
| 2 | a call that cannot be meant: unknown option, index out of range, contradicting options |
| 3 | not a valid pack |
| 4 | the backbone is missing, changed or refused; `verify --decode`: it makes other images |
| 5 | a file, directory or repository is not there |
| 6 | the Hugging Face Hub, or the way to it, failed |
| 7 | the real images cannot be used |
| 130 | interrupted; `encode`, `decode`, `train`, `eval` and `demo` go on when called again |
"""


def reference() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in sorted(leaves(root)):
        parts.append(f"## d3pack {name}\n\n{prose(command)}\n")
        rows = [row(option) for option in command.params if option.name != "help"]
        parts.append("| option | meaning | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def leaves(command: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every verb, with the path of names that leads to it."""
    found = []
    for name, child in command.commands.items():
        path = f"{prefix} {name}".strip()
        found += leaves(child, path) if hasattr(child, "commands") else [(path, child)]
    return found


def prose(command: Any) -> str:
    """The help text; its example as code."""
    text = inspect.cleandoc(command.help or "")
    return re.sub(r"^Example: (.+)$", r"    \1", text, flags=re.MULTILINE)


def row(option: Any) -> str:
    """One line of the table."""
    if option.param_type_name == "argument":
        names = f"`{(option.metavar or option.name).upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default = option.default
    plain = isinstance(default, (str, int, float, tuple)) and not isinstance(default, bool)
    shown = f"`{default}`" if plain and default != "" else ""
    return f"| {names} | {getattr(option, 'help', None) or ''} | {shown} |"


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
