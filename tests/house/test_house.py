"""The rules of docs/architecture.md that a machine can check: floors, rooms, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house_imports import PACKAGE, cycles, dotted, exported, graph, imports, modules, room
from places import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# name and content of each floor; each imports only from those above it
FLOORS = dict(
    line.split(maxsplit=1)
    for block in re.findall(r"^```floors\n(.*?)^```", ARCHITECTURE, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
)
LEVELS = {name: level for level, name in enumerate(FLOORS)}
HEAVY_ROOMS = {
    "backbones",
    "teachers",
    "students",
    "train",
    "encode",
}  # may import diffusers and transformers
NUMPY_ONLY = {"errors", "format"}  # in system, devices.py imports torch when it is called
LIGHT_CALLS = (
    "import d3pack",
    "import d3pack.cli",
    "import d3pack, sys; d3pack.read; d3pack.write; d3pack.Pack",
)
PUBLIC = {
    "BackboneError",
    "BackboneRef",
    "Coded",
    "D3MDataset",
    "D3MError",
    "Decoder",
    "FileLock",
    "HubError",
    "InvalidPackError",
    "Ledger",
    "NoSpaceError",
    "NotFoundError",
    "Pack",
    "Probes",
    "Recipe",
    "SourceError",
    "StorageError",
    "UsageError",
    "__version__",
    "pack_bytes",
    "pull",
    "push",
    "read",
    "train_backbone",
    "write",
}


# rooms inside rooms, with an `__init__` of their own
SUB_ROOMS = {"format.codecs"}

PATHS = pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))


def test_floors_are_the_rooms_of_the_package() -> None:
    assert {room(dotted(path)) for path in modules()} - {""} == set(FLOORS)


@PATHS
def test_floors_import_only_from_those_above(path: Path) -> None:
    own = room(dotted(path))
    if not own:
        return
    for entry in imports(path):
        target = room(f"{entry.module}.{entry.name}")
        if entry.module.split(".")[0] != "d3pack" or target in {*PUBLIC, ""}:
            continue
        place = f"{path.relative_to(ROOT)}:{entry.line}"
        assert LEVELS[target] <= LEVELS[own], f"{place}: {own} imports {target}, a later floor"


def deep_imports() -> set[str]:
    """Return the imports of what another room does not export, as "module: imported name"."""
    deep: set[str] = set()
    for path in modules():
        for entry in imports(path):
            top, *inner = entry.module.split(".")
            if top != "d3pack" or inner[:1] == [room(dotted(path))]:
                continue
            if not inner:  # from d3pack import name
                allowed = entry.name in {"", *PUBLIC, *LEVELS}
            else:
                is_room = len(inner) == 1 or ".".join(inner) in SUB_ROOMS
                allowed = is_room and entry.name in {"", *exported("/".join(inner))}
            if not allowed:
                deep.add(f"{dotted(path)}: {entry.module}.{entry.name}".rstrip("."))
    return deep


def test_rooms_import_only_what_other_rooms_export() -> None:
    assert deep_imports() == set(), "import these from the room's __init__"


def test_modules_import_each_other_in_no_circle() -> None:
    assert cycles(graph()) == []


@PATHS
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    own = room(dotted(path))
    for entry in imports(path):
        top = entry.module.split(".")[0]
        if top in {"diffusers", "transformers"}:
            assert own in HEAVY_ROOMS, f"{path} imports {top}"
        if top == "torch" and not entry.typing_only:
            assert own not in NUMPY_ONLY, f"{path} imports torch"


@pytest.mark.parametrize("statement", LIGHT_CALLS)
def test_torch_stays_out_of_light_calls(statement: str) -> None:
    check = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("args", [["--help"], ["encode", "--help"], ["eval", "--help"]])
def test_numpy_stays_out_of_the_help(args: list[str]) -> None:
    """A quarter of a second is all that --help and completion may take."""
    check = f"import d3pack.cli, sys; d3pack.cli.run({args}); "
    check += "sys.exit(bool({'numpy', 'rich'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_test_modules_lie_in_rooms() -> None:
    """One folder an area; what they share lies in tests/helpers."""
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]
    for path in (ROOT / "tests" / "helpers").glob("*.py"):
        assert not path.name.startswith("test_"), path


def test_public_names() -> None:
    import d3pack

    assert {*d3pack.__all__, "__version__"} == PUBLIC
    for name in d3pack.__all__:
        assert getattr(d3pack, name) is not None


def test_codes_are_raised_with_their_classes() -> None:
    """Every literal `code=` is in `CODES`, with the class that it is raised with."""
    from d3pack.errors import CODES

    uses: set[tuple[str, str]] = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        uses.add((node.func.id, str(keyword.value.value)))
    assert len(uses) > 30
    assert {(name, code) for name, code in uses if CODES[code][0] != name} == set()


def test_test_modules_import_nothing_that_windows_lacks() -> None:
    """Collection must not fail where the tests that need them are skipped."""
    missing = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert missing.isdisjoint(names), path.name
