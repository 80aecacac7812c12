"""The modules of d3pack and what each of them imports, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "d3pack"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, or one name imported from a module."""

    module: str
    name: str  # "" for `import module`
    typing_only: bool
    line: int


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """Return the module name of a file: `d3pack.format.pack`, `d3pack.format` for `__init__`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Return the room of a module, or "" for `d3pack` itself and `d3pack.__main__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return everything that a file imports, in functions and type-checking blocks too."""
    return tuple(_walk(ast.parse(path.read_text(encoding="utf-8")), path, typing_only=False))


def _walk(node: ast.AST, path: Path, *, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, "", typing_only, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: relative import"
            for alias in child.names:
                yield Import(child.module or "", alias.name, typing_only, child.lineno)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _walk(ast.Module(child.body, []), path, typing_only=True)
            yield from _walk(ast.Module(child.orelse, []), path, typing_only=typing_only)
        else:
            yield from _walk(child, path, typing_only=typing_only)


@cache
def exported(name: str) -> frozenset[str]:
    """Return the names that a room gives to other rooms: its stub's, `__all__`, or public ones."""
    stub = PACKAGE / name / "__init__.pyi"
    if stub.is_file():
        return frozenset(entry.name for entry in imports(stub))
    path = PACKAGE / name / "__init__.py"
    path = path if path.is_file() else PACKAGE / f"{name}.py"
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in assigned and node.value is not None:
                return frozenset(ast.literal_eval(node.value))
            names |= assigned
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return frozenset(name for name in names if not name.startswith("_"))


def graph() -> Mapping[str, frozenset[str]]:
    """Return, for each module, the modules of d3pack that it needs to run.

    Imports inside functions count, those for the type checker do not. A name that a package
    imports on first use counts as an import of the module that defines it, known from the
    package's stub. The packages that a module lies in do not count: Python imports them before any
    module of theirs.
    """
    files = {dotted(path): path for path in modules()}
    homes = {
        (package, entry.name): entry.module
        for package, path in files.items()
        if (stub := path.with_name("__init__.pyi")).is_file() and path.name == "__init__.py"
        for entry in imports(stub)
        if entry.module in files
    }
    edges: dict[str, frozenset[str]] = {}
    for module, path in files.items():
        reached: set[str] = set()
        for entry in imports(path):
            if entry.typing_only or entry.module not in files:
                continue
            submodule = f"{entry.module}.{entry.name}"
            if submodule in files:
                reached |= {entry.module, submodule}
            else:
                reached |= {entry.module, homes.get((entry.module, entry.name), entry.module)}
        edges[module] = frozenset(
            target for target in reached if target != module and not module.startswith(f"{target}.")
        )
    return edges


def cycles(edges: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, however long the way (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in sorted(edges[module]):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(edges):
        if module not in order:
            visit(module)
    return groups
