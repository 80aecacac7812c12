"""Run a benchmark by name, or list them."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def names() -> dict[str, str]:
    """Return the benchmarks with the first line of their docstrings."""
    found = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    known = names()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [ARGUMENTS]; NAME --help tells the arguments\n")
        print("\n".join(f"{name:16} {line}" for name, line in known.items()))
        return 0
    if arguments[0] not in known:
        print(f"no benchmark {arguments[0]!r}: expected {', '.join(known)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
