"""A pack as one self-contained page: images, soft labels, ledger, recipe, verification."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from d3pack.format import Ledger, Pack
from d3pack.format.codecs import decode_labels
from d3pack.preview.sheet import Sample
from d3pack.system import flatten, printable, size

SHOWN_LABELS = 3
TINY = 32  # pixels; images up to this side are enlarged as squares


def html_text(text: str) -> str:
    """Return HTML that shows a text from a file as it is.

    Control characters, and those that change the direction of text, are shown as escapes.
    """
    return escape(printable(text))


def document(title: str, body: str) -> str:
    """Return a complete HTML page, which loads nothing and runs no scripts."""
    package = resources.files("d3pack.preview")
    page = Template(package.joinpath("page.html").read_text(encoding="utf-8"))
    style = package.joinpath("style.css").read_text(encoding="utf-8")
    return page.substitute(title=html_text(title), style=style, body=body)


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """Return a CHW image as a PNG for an `img` element."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 1) -> str:
    """Return a table of cells that are HTML already.

    The first column names its row; the last `numbers` columns are figures.
    """
    first_number = len(head) - numbers
    kinds = ["" if i < first_number else ' class="number"' for i in range(len(head))]
    top = "".join(
        f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row"{kinds[0]}>{name}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells, kinds[1:], strict=True))
        + "</tr>"
        for name, *cells in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def render_page(pack: Pack, shown: Sample, *, name: str, verdict: str = "") -> str:
    """Return the page of a pack.

    Args:
        pack: the pack.
        shown: images to show.
        name: title.
        verdict: what `verify_probes` says about the pack on this machine, if it was asked.
    """
    ledger = pack.ledger()
    backbone = pack.recipe.backbone
    badges = ['<span class="badge good">every hash verified</span>']
    if verdict:
        tone = {"exact": "good", "within tolerance": "warn"}.get(verdict, "bad")
        badges.append(f'<span class="badge {tone}">probes: {html_text(verdict)}</span>')
    facts = (
        (f"{len(pack.classes):,}", "classes"),
        (f"{len(pack):,}", "images"),
        (size(ledger.total), "this file"),
        (f"{size(ledger.per_image)}", "an image"),
        (html_text(backbone.repo or backbone.kind), f"backbone, {size(ledger.backbone)}, shared"),
    )
    cards = "".join(
        f"<li><strong>{value}</strong><span>{what}</span></li>" for value, what in facts
    )
    parts = (
        '<a class="skip" href="#bytes">Skip the images</a>',
        f"<header><h1>{html_text(name)}</h1>",
        f'<p class="faint">identity <code>{pack.root}</code></p><p>{" ".join(badges)}</p></header>',
        f'<ul class="facts">{cards}</ul>',
        f"<main><h2>Images</h2>{_classes(pack, shown)}",
        f'<h2 id="bytes">Where the bytes are</h2>{_ledger(ledger)}',
        f"<h2>How the images are made</h2>{_recipe(pack)}",
        f"<h2>Provenance</h2>{_provenance(pack.provenance)}</main>",
    )
    return document(name, "\n".join(parts))


def _classes(pack: Pack, shown: Sample) -> str:
    note = ""
    columns = shown.images.shape[1]
    if len(shown.classes) < len(pack.classes) or columns < pack.images_per_class:
        note = (
            f'<p class="faint">{len(shown.classes)} of {len(pack.classes)} classes, '
            f"{columns} of {pack.images_per_class} images each.</p>"
        )
    tiny = " small" if max(pack.recipe.size) <= TINY else ""
    blocks = []
    for c, images in zip(shown.classes, shown.images, strict=True):
        title = html_text(pack.classes[c])
        strip = "".join(
            f'<img tabindex="0" src="{data_uri(image)}" alt="{title}, image {i}">'
            for i, image in enumerate(images)
        )
        bars = ""
        if pack.labels is not None:
            bars = _bars(pack.classes, decode_labels(pack.labels, c).mean(axis=0))
        blocks.append(
            f'<section class="class"><div><h3>{title}</h3>{bars}</div>'
            f'<div class="strip{tiny}" style="--n:{len(images)}">{strip}</div></section>'
        )
    return note + "".join(blocks)


def _bars(classes: Sequence[str], mean: npt.NDArray[np.float32]) -> str:
    top = np.argsort(-mean, kind="stable")[:SHOWN_LABELS]
    items = "".join(
        f'<li><i style="width:{100 * mean[c]:.1f}%"></i>'
        f"<b>{100 * mean[c]:.0f}% {html_text(classes[c])}</b></li>"
        for c in top
    )
    return f'<ul class="bars" aria-label="mean soft label">{items}</ul>'


def _ledger(ledger: Ledger) -> str:
    rows = [
        (html_text(name), f"{nbytes:,} B", bar(nbytes / ledger.total))
        for name, nbytes in sorted(ledger.sections.items(), key=lambda entry: -entry[1])
    ]
    rows.append(("<strong>file</strong>", f"<strong>{ledger.total:,} B</strong>", bar(1)))
    others = [f"backbone {ledger.backbone:,} B, downloaded once for all packs"]
    if ledger.teacher:
        others.append(f"teacher {ledger.teacher:,} B, needed only to encode")
    return (
        table(("section", "bytes", "share"), rows, numbers=2)
        + f'<p class="faint">Not in the file: {"; ".join(others)}.</p>'
    )


def bar(part: float) -> str:
    """Return a share of one as a bar with its figure, for a cell of a table."""
    bar = f'<span class="meter" aria-hidden="true"><i style="width:{100 * part:.1f}%"></i></span>'
    return f'{bar}<span class="share">{100 * part:.1f} %</span>'


def _recipe(pack: Pack) -> str:
    recipe = pack.recipe
    prompts = "none"
    if pack.prompts is not None:
        shape = " x ".join(map(str, pack.prompts.params.get("shape", ())))
        prompts = f"{pack.prompts.codec}, {shape or 'see manifest'}"
    rows = (
        ("backbone", f"{recipe.backbone.repo or 'a directory'} ({recipe.backbone.kind})"),
        ("revision", recipe.backbone.revision),
        ("licence", recipe.backbone.licence),
        ("size", f"{recipe.size[0]} x {recipe.size[1]} px" + (", grey" if recipe.grey else "")),
        ("sampler", pack.sampling),
        ("template", "none: outputs" if recipe.template is None else recipe.template),
        ("prompts", prompts),
        ("codes", _codes(pack)),
        ("seed", f"{pack.seed:016x}" + (", curated picks" if pack.picks is not None else "")),
        ("exact at", f"{recipe.dtype}, groups of {recipe.group}"),
    )
    return table(
        ("what", "value"),
        [(what, f"<code>{html_text(value)}</code>") for what, value in rows],
        numbers=0,
    )


def _codes(pack: Pack) -> str:
    if pack.codes is None:
        return "none"
    count = pack.codes.params["codes"]
    if not pack.holds_photographs:
        return f"{count:,} images a class made for clusters of photographs, which may resemble one"
    return f"{count:,} photographs a class, whose likeness can be rebuilt"


def _provenance(values: Mapping[str, Any]) -> str:
    if not values:
        return '<p class="faint">None recorded.</p>'
    rows = [(html_text(k), f"<code>{html_text(v)}</code>") for k, v in flatten(values)]
    return table(("field", "value"), rows, numbers=0)
