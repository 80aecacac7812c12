"""Draw the figure and the Markdown table of a committed table of results.

python -m benchmarks figure cifar10        # writes results/table-cifar10.svg and .md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.readme import CHOSEN, RANDOM, best
from benchmarks.results import RESULTS, load
from d3pack.evaluate.charts import Series, accuracy_per_byte
from d3pack.system import size

TITLES = {
    "pack": "packs",
    "names": "class names as prompts, 0 bytes a class",
    "webp": "real images, WebP files",
    "jpeg": "real images, JPEG files",
    "sheet": "real images, tiles of one WebP picture",
    "avif": "real images, tiles of one AVIF picture",
    "collages": "images chosen by a teacher, tiles of one WebP picture",
    "chosen": "images chosen by a teacher, tiles of one {codecs} picture",
    "rded": "crops chosen by a teacher (RDED), tiles of one {codecs} picture",
    "random": "random real images, lossless",
    "whole": "all real images, lossless",
}
LINES = {
    "packs": ("pack",),
    "the best chosen photographs": CHOSEN,
    "the best random photographs": RANDOM,
}
LEVELS = {"whole": "all real images", "names": "class names as prompts"}
# Inside an <img> the figure does not inherit the page's colours: it asks for the scheme itself.
STYLE = (
    "<style>svg { color: #1f2024; } "
    "@media (prefers-color-scheme: dark) { svg { color: #ecebe8; } }</style>"
)


def best_of(table: dict[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return the best row of each budget among some arms: by test accuracy, in their favour."""
    rows = table["rows"]
    budgets = {row["budget"] for row in rows.values() if row["arm"] in arms}
    return [best(rows, budget, *arms) for budget in sorted(budgets)]


def figure(table: dict[str, Any]) -> str:
    """Accuracy against bytes: packs, the best photographs of both kinds, and all photographs."""
    series = []
    for title, arms in LINES.items():
        rows = best_of(table, arms)
        if rows:
            series.append(
                Series(
                    title,
                    [row["bytes"] for row in rows],
                    [row["last"]["mean"] for row in rows],
                    [row["last"]["std"] for row in rows],
                )
            )
    levels = {
        LEVELS[row["arm"]]: row["last"]["mean"]
        for row in table["rows"].values()
        if row["arm"] in LEVELS
    }
    svg = accuracy_per_byte(
        series,
        levels=levels,
        chance=1 / len(table["classes"]),
        title=f"Accuracy against bytes sent, {table['target']}",
        salt=table["target"],
    )
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + STYLE + svg[start:]


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    last, runs = row["last"], len(row["runs"])
    mean = f"{100 * last['mean']:.1f}"
    return f"{mean} ± {100 * last['std']:.1f}" if runs > 1 else f"{mean} (1 seed)"


def title(arm: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return what rows of an arm are, with the codecs that were tried for them."""
    details = [row.get("detail", {}) for row in rows]
    tried = " ".join(text for d in details for text in (d.get("payload", ""), *d.get("pilot", ())))
    codecs = [name for name in ("AVIF", "WebP") if name in tried]
    return TITLES[arm].format(codecs=" or ".join(codecs))


def markdown(table: dict[str, Any]) -> str:
    """Rows are kinds of payload, columns are budgets."""
    rows = table["rows"]
    budgets = sorted({row["budget"] for row in rows.values() if row["budget"]})
    lines = [
        "| trained on | " + " | ".join(f"≤ {size(b)}" for b in budgets) + " |",
        "|---|" + "---:|" * len(budgets),
    ]
    for arm in ("pack", "webp", "jpeg", "sheet", "avif", "collages", "chosen", "rded"):
        found = {row["budget"]: row for row in best_of(table, [arm])}
        if found:
            cells = " | ".join(cell(found.get(budget)) for budget in budgets)
            lines.append(f"| {title(arm, found.values())} | {cells} |")
    chance = 1 / len(table["classes"])
    packs = {row["budget"]: row for row in rows.values() if row["arm"] == "pack"}
    for name, against in (
        ("files", ("webp", "jpeg")),
        ("sheet", ("sheet", "avif", "collages", "chosen", "rded")),
    ):
        ratios = []
        for budget in budgets:
            real = [
                row["last"]["mean"]
                for row in rows.values()
                if row["budget"] == budget and row["arm"] in against
            ]
            if budget in packs and real:
                gain = (packs[budget]["last"]["mean"] - chance) / max(max(real) - chance, 1e-9)
                ratios.append(f"{gain:.1f} x")
            else:
                ratios.append("–")
        if set(ratios) != {"–"}:
            lines.append(f"| pack to best real {name}, above chance | {' | '.join(ratios)} |")
    for arm in ("names", "random", "whole"):
        for row in rows.values():
            if row["arm"] == arm:
                what = f"{row['runs'][0]['images']} images"
                lines.append(f"\n{TITLES[arm]}, {what}: {cell(row)} %")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name")
    args = parser.parse_args(arguments)
    path = RESULTS / f"table-{args.name}.json"
    table = load(f"table-{args.name}")
    path.with_suffix(".svg").write_text(figure(table), encoding="utf-8")
    text = markdown(table)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
