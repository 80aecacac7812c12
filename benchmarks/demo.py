"""Copy the pack and the figures that `d3pack demo` shows; a test compares them.

python -m benchmarks demo
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.readme import best
from benchmarks.results import RESULTS, load

FOLDER = Path(__file__).parents[1] / "d3pack" / "demo"
PACK = RESULTS / "table-cifar10-6000.d3m"
BUDGET = 6000


def figures() -> dict[str, Any]:
    """Return the rows that the demo shows, each beside a pack of the smallest budget."""
    table = load("table-cifar10")
    rows = table["rows"]
    random, chosen = ("sheet", "avif", "webp", "jpeg"), ("collages", "chosen", "rded")
    shown = [
        ("a pack", rows[f"pack {BUDGET:,} B"]),
        ("random photographs in as many bytes", best(rows, BUDGET, *random)),
        ("photographs chosen by a teacher in as many bytes", best(rows, BUDGET, *chosen)),
        ("class names as prompts", rows["names"]),
        ("random photographs without loss", rows["random"]),
    ]
    first = rows[f"pack {BUDGET:,} B"]["runs"][0]
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
