"""The page that the demo ends with: what happened in one sentence, pictures, what to do next."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from d3pack.demo.photographs import Photographs
from d3pack.evaluate import Evaluation
from d3pack.preview import Row, bar, contact_sheet, document, table
from d3pack.system import size

CELL = 56  # pixels of an image on the page
NEXT = (
    (
        "Make a pack of your images",
        "d3pack encode photos/ -o photos.d3m",
        "a folder for each class",
    ),
    ("See what it is worth", "d3pack eval photos.d3m --real photos/ --report worth.html", ""),
    (
        "Train on it",
        'D3MDataset("photos.d3m")',
        "<code>from d3pack import D3MDataset</code>: a PyTorch dataset of images and labels",
    ),
)


def render_demo(
    headline: str,
    comparison: str,
    digits: Sequence[tuple[str, Sequence[Row]]],
    evaluation: Evaluation,
    photographs: Photographs,
) -> str:
    """Return the page.

    Args:
        headline: what happened, in one sentence.
        comparison: what it is beside other ways to send as much.
        digits: sheets of digits, each with its caption.
        evaluation: of the pack of digits.
        photographs: the example of photographs.
    """
    sheets = "".join(_sheet(caption, rows) for caption, rows in digits)
    parts = (
        f"<header><h1>{escape(headline)}</h1><p>{escape(comparison)}</p></header>",
        f'<main><div class="side-by-side">{sheets}</div>',
        _worth(evaluation),
        f"<h2>Photographs</h2>{_photographs(photographs)}",
        f"<h2>What to do next</h2>{_next()}",
        '<p class="faint">All images of packs on this page were made on this machine, by'
        " <code>mini</code>, whose weights are for non-commercial research.</p></main>",
    )
    return document("d3pack demo", "\n".join(parts))


def _sheet(caption: str, rows: Sequence[Row]) -> str:
    picture = io.BytesIO()
    contact_sheet(rows, cell=CELL).save(picture, "WEBP", quality=90)
    data = base64.b64encode(picture.getvalue()).decode()
    return (
        f'<figure><img src="data:image/webp;base64,{data}" alt="{escape(caption)}: a row of images'
        f' for each of {len(rows)} classes"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _worth(evaluation: Evaluation) -> str:
    rows = [
        {
            "title": result.entry.title,
            "images": result.histories[0].images,
            "bytes": result.mean_bytes,
            "mean": result.last.mean,
        }
        for result in evaluation.results
    ]
    facts, tested = evaluation.facts, evaluation.facts["test_images"]
    return (
        f"{_bars(rows, f'accuracy on {tested:,} real digits')}"
        f'<p class="faint">A {escape(str(facts["student"]))} trained from scratch on each,'
        f" {facts['updates']:,} updates. Everything about it: "
        '<a href="report.html">the evaluation</a>, which <code>d3pack eval</code> makes for any'
        " pack.</p>"
    )


def _photographs(photographs: Photographs) -> str:
    pack, figures = photographs.pack, photographs.figures
    rows = [Row(pack.classes[c], images) for c, images in _classes(photographs)]
    tested = figures["test_images"]
    note = f"Measured before: a {escape(figures['student'])}, {figures['updates']:,} updates."
    return (
        f"<p>A pack of CIFAR-10 of {pack.ledger().total:,} bytes comes with d3pack: prompts that"
        f" were learned from its photographs, and seeds. From it this machine has just made these"
        f" images, the first of {pack.images_per_class:,} a class; everyone gets the same.</p>"
        f"{_sheet('Made from the pack', rows)}"
        f"{_bars(figures['rows'], f'accuracy on {tested:,} real photographs')}"
        f'<p class="faint">{note}</p>'
    )


def _classes(photographs: Photographs) -> Sequence[tuple[int, Any]]:
    shown = photographs.shown
    return list(zip(shown.classes, shown.images, strict=True))


def _bars(rows: Sequence[Mapping[str, Any]], measured: str) -> str:
    """Return a table with a bar for each accuracy, the first row in bold."""
    cells = []
    for number, row in enumerate(rows):
        title = escape(row["title"][:1].upper() + row["title"][1:])
        cells.append(
            (
                f"<strong>{title}</strong>" if number == 0 else title,
                f"{row['images']:,}",
                "-" if row["bytes"] is None else size(row["bytes"]),
                bar(row["mean"]),
            )
        )
    return table(("trained on", "images", "bytes", measured), cells, numbers=3)


def _next() -> str:
    rows = [
        (what, f"<code>{escape(typed)}</code>" + (f"<br>{note}" if note else ""))
        for what, typed, note in NEXT
    ]
    return table(("to", "type"), rows, numbers=0)
