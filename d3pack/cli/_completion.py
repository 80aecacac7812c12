"""Completion in a shell: `--install-completion` and `--show-completion`."""

from __future__ import annotations

import os
from typing import Any

import click

from d3pack.errors import UsageError

PROGRAM = "d3pack"
VARIABLE = "_D3PACK_COMPLETE"  # set by a shell that asks for completions
DETECTED = "detected"
_FILES = {
    "bash": ".bash_completions/d3pack.sh",
    "zsh": ".zfunc/_d3pack",
    "fish": ".config/fish/completions/d3pack.fish",
}
_START = {  # a line of the shell's start file
    "bash": (".bashrc", "source ~/.bash_completions/d3pack.sh"),
    "zsh": (".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
}


def options() -> list[click.Parameter]:
    """Return the two options of the command itself."""
    how: dict[str, Any] = {
        "is_flag": False,
        "flag_value": DETECTED,
        "is_eager": True,
        "expose_value": False,
        "metavar": "[SHELL]",
    }
    return [
        click.Option(
            ["--install-completion"],
            callback=_install,
            help="Install completion for bash, zsh or fish.",
            **how,
        ),
        click.Option(
            ["--show-completion"], callback=_show, help="Print that completion instead.", **how
        ),
    ]


def complete(root: click.Command, instruction: str) -> int:
    """Answer a shell that asks how a line may go on."""
    from click.shell_completion import shell_complete

    return shell_complete(root, {}, PROGRAM, VARIABLE, instruction)


def _install(ctx: click.Context, param: click.Parameter, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    from d3pack.system import expand_user, replace_file

    shell = _shell(shell)
    home = expand_user("~")
    path = home / _FILES[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _script(ctx.command, shell).encode())
    if shell in _START:
        name, line = _START[shell]
        start = home / name
        before = start.read_text(encoding="utf-8") if start.exists() else ""
        if line not in before.splitlines():
            replace_file(start, f"{before.rstrip()}\n{line}\n".lstrip().encode())
    print(f"{shell} completion installed in {path}; it works in the next shell")
    ctx.exit()


def _show(ctx: click.Context, param: click.Parameter, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    print(_script(ctx.command, _shell(shell)))
    ctx.exit()


def _script(root: click.Command, shell: str) -> str:
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(root, {}, PROGRAM, VARIABLE).source()


def _shell(name: str) -> str:
    """The shell that was named, or the one that this process was started from."""
    from pathlib import Path

    if name == DETECTED:
        parent = Path(f"/proc/{os.getppid()}/comm")
        name = parent.read_text().strip() if parent.exists() else ""
        if name not in _FILES:
            name = Path(os.environ.get("SHELL", "")).name
    if name not in _FILES:
        raise UsageError(f"invalid shell {name!r}: expected {', '.join(_FILES)}")
    return name
