"""Copy the pack and the figures that `d3pack demo` shows; a test compares them.

python -m benchmarks demo
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "d3pack" / "demo"
PACK = ROOT / "examples" / "cifar10.d3m"
BUDGET = 6000


def figures() -> dict[str, Any]:
    """Return the rows that the demo shows: a pack, photographs, and what is possible."""
    table = load("table-cifar10-standard")
    rows = table["rows"]
    shown = [
        ("a pack", rows[f"pack {BUDGET:,} B"]),
        (f"the best photographs in {BUDGET:,} bytes", rows[f"chosen {BUDGET:,} B"]),
        ("all photographs", rows["whole"]),
    ]
    first = shown[0][1]["runs"][0]
    return {
        "student": first["student"],
        "updates": first["updates"],
        "test_images": table["test_images"],
        "rows": [
            {
                "title": title,
                "images": row["runs"][0]["images"],
                "bytes": row["bytes"] and round(row["bytes"]),
                "mean": row["last"]["mean"],
                "std": row["last"]["std"],
            }
            for title, row in shown
        ],
    }


def main(arguments: list[str]) -> None:
    """Write both files."""
    (FOLDER / "cifar10.d3m").write_bytes(PACK.read_bytes())
    text = json.dumps(figures(), indent=1) + "\n"
    (FOLDER / "cifar10.json").write_text(text, encoding="utf-8")
