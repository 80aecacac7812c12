"""The house rules that a machine can check: layers, light imports, module size, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "d3pack"

# Each layer imports only from those above it in this list.
LAYERS = (
    "errors",
    "system",
    "format",
    "backbones",
    "decode",
    "hub",
    "dataset",
    "preview",
    "sources",
    "teachers",
    "train",
    "encode",
    "evaluate",
    "demo",
    "cli",
    "testing",
)
HEAVY_ROOMS = {
    "backbones",
    "teachers",
    "train",
    "encode",
    "evaluate",
}  # may import diffusers and transformers
NUMPY_ONLY = {"errors", "system", "format"}
LIGHT_CALLS = (
    "import d3pack",
    "import d3pack.cli",
    "import d3pack, sys; d3pack.read; d3pack.write; d3pack.Pack",
)
BIG_MODULE = 400
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
    "NotFoundError",
    "Pack",
    "Probes",
    "Recipe",
    "SourceError",
    "UsageError",
    "__version__",
    "pack_bytes",
    "read",
    "write",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Every module name imported by a file, and whether that is only for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        }:
            typing_only.update(id(inner) for inner in ast.walk(node))
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "d3pack" else [base]
            found += [(name, id(node) in typing_only) for name in names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers_import_only_downwards(path: Path) -> None:
    here = room(path)
    if here in {"__init__", "__main__"}:
        return
    assert here in LAYERS, f"{here} is in no layer: add it to the design and to LAYERS"
    for name, _ in imported(path):
        top, *rest = name.split(".")
        if top != "d3pack" or not rest or rest[0] in PUBLIC:
            continue
        assert rest[0] in LAYERS, f"{path.name} imports unknown layer {name}"
        assert LAYERS.index(rest[0]) <= LAYERS.index(here), f"{path.name} reaches up to {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    here = room(path)
    for name, typing_only in imported(path):
        top = name.split(".")[0]
        if top in {"diffusers", "transformers"}:
            assert here in HEAVY_ROOMS, f"{path} imports {top}"
        if top == "torch" and not typing_only:
            assert here not in NUMPY_ONLY, f"{path} imports torch"


@pytest.mark.parametrize("statement", LIGHT_CALLS)
def test_torch_stays_out_of_light_calls(statement: str) -> None:
    check = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_numpy_stays_out_of_the_help() -> None:
    """A quarter of a second is all that --help and completion may take."""
    check = "import d3pack.cli._app, sys; sys.exit(bool({'numpy', 'rich'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("top", ["d3pack", "tests", "spec", "examples", "benchmarks"])
def test_modules_fit_on_a_few_screens(top: str) -> None:
    lines = {p: p.read_text(encoding="utf-8").count("\n") for p in (ROOT / top).rglob("*.py")}
    assert lines
    assert {str(path) for path, count in lines.items() if count > BIG_MODULE} == set()


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
                        uses.add((node.func.id, keyword.value.value))
    assert len(uses) > 30
    assert {(name, code) for name, code in uses if CODES[code][0] != name} == set()
