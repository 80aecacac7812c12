"""Write the cards of the packs in `examples/README.md`; a test compares them.

    python -m benchmarks gallery
    python -m benchmarks gallery --measure fashion-mnist --real fashion-mnist --work work/gallery

What students learned comes from the committed results that were measured with this very pack: those
of a table, or those of `--measure`, which trains students on a pack alone. The pictures are made by
`d3pack preview examples/NAME.d3m -o examples/NAME.webp --ipc 10`.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import d3pack
from benchmarks.readme import CHOSEN, RANDOM, best, percent
from benchmarks.results import RESULTS, command, load, save
from d3pack.evaluate import EvalSettings, evaluate
from d3pack.format import Pack
from d3pack.hub import snippets

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES / "README.md"
WHAT = "Packs of the gallery: accuracy of students on real test images"
BLOCK = re.compile(r"<!-- packs -->.*<!-- /packs -->", re.DOTALL)
VIEWER = "https://d3pack.github.io/d3pack/viewer/"


@dataclass(frozen=True)
class Origin:
    """What a pack does not say about itself."""

    command: str
    source: str  # what it was learned from


ORIGINS = {
    "cifar10": Origin(
        "d3pack encode cifar10/ --budget 6kB --for-updates 1500 -o cifar10.d3m",
        "the 50,000 training images of CIFAR-10 (32 px)",
    ),
    "fashion-mnist": Origin(
        "d3pack encode fashion-mnist/ --budget 6kB --no-codes --teacher-samples 60000"
        " -o fashion-mnist.d3m",
        "the 60,000 training images of Fashion-MNIST (28 px, MIT licence): things that `mini` has"
        " never seen on black ground",
    ),
}
CARD = """\
### `{name}.d3m`: {nbytes:,} bytes, {images:,} images of {classes} classes

    {command}

{about}

![Ten images of each class that the pack rebuilds]({name}.webp)

{worth}

{snippets}"""


def worth(pack: Pack) -> str:
    """Return what students learned from a pack and from photographs of its size."""
    for path in sorted(RESULTS.glob("table-*.json")):
        table = load(path)
        for budget, made in table["packs"].items():
            if pack.root in {made["root"], made.get("rewritten", {}).get("root")}:
                return _figures(table["rows"], int(budget), path.stem, table["test_images"])
    measured = [row for row in load("gallery").values() if row["root"] == pack.root]
    if measured:
        return _measured(measured[0])
    return (
        "What students learn from it was not measured; from packs made like it, see the"
        " [results](../benchmarks/README.md)."
    )


def _measured(row: Mapping[str, Any]) -> str:
    return (
        f"Students ({row['student']}, {row['updates']:,} updates, {row['seeds']} seeds) that"
        f" learned from it recognise {100 * row['mean']:.1f} ± {100 * row['std']:.1f} % of"
        f" {row['test_images']:,} real test images ([figures](../benchmarks/results/gallery.json))."
    )


def measure(name: str, real: Path, work: Path, arguments: Sequence[str]) -> None:
    """Train students on a pack, and keep what they reach with the results."""
    settings = EvalSettings(baselines=("none",))
    evaluation = evaluate(EXAMPLES / f"{name}.d3m", real, settings, work=work)
    facts, last = evaluation.facts, evaluation.results[0].last
    figures = load("gallery")
    figures[name] = {
        "root": evaluation.pack.root,
        **{fact: facts[fact] for fact in ("student", "updates", "seeds", "test_images")},
        "mean": last.mean,
        "std": last.std,
    }
    save(RESULTS / "gallery.json", WHAT, command("gallery", arguments), figures)


def _figures(rows: Mapping[str, Any], budget: int, name: str, test_images: int) -> str:
    row = rows[f"pack {budget:,} B"]
    run, photographs = row["runs"][0], best(rows, budget, *RANDOM, *CHOSEN)
    return (
        f"Students ({run['student']}, {run['updates']:,} updates, {len(row['runs'])} seeds) that"
        f" learned from it recognise {percent(row)} of {test_images:,} real test images; from the"
        f" best photographs in {budget:,} bytes, {percent(photographs)}"
        f" ([all rows](../benchmarks/results/{name}.json))."
    )


def card(path: Path) -> str:
    """Return the card of a pack."""
    pack, origin = d3pack.read(path), ORIGINS[path.stem]
    ledger = pack.ledger()
    parts = sorted(ledger.sections.items(), key=lambda part: -part[1])
    about = (
        f"Identity `{pack.root[:16]}`; learned from {origin.source}. Its bytes:"
        f" {', '.join(f'{part} {nbytes:,}' for part, nbytes in parts)}."
        f" [Watch its images being made]({VIEWER}?pack={path.name}) in the browser."
    )
    return CARD.format(
        name=path.stem,
        nbytes=ledger.total,
        images=len(pack),
        classes=len(pack.classes),
        command=origin.command,
        about=_wrapped(about),
        worth=_wrapped(worth(pack)),
        snippets=snippets.blocks(f"examples/{path.name}", pack.recipe.size, ("mini",)),
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def block() -> str:
    """Return the cards of all packs."""
    cards = (card(path) for path in sorted(EXAMPLES.glob("*.d3m")))
    return "<!-- packs -->\n" + "\n\n".join(cards) + "\n<!-- /packs -->"


def main(arguments: Sequence[str]) -> None:
    """Write the cards into the README."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--measure", choices=ORIGINS)
    options.add_argument("--real", type=Path)
    options.add_argument("--work", type=Path)
    args = options.parse_args(arguments)
    if args.measure is not None:
        if args.real is None or args.work is None:
            options.error("--measure needs --real and --work")
        measure(args.measure, args.real, args.work, arguments)
    before, after = BLOCK.split(README.read_text("utf-8"))
    README.write_text(f"{before}{block()}{after}", "utf-8")
