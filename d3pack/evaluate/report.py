"""The evaluation as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from d3pack import __version__
from d3pack.evaluate import charts
from d3pack.evaluate.bench import ArmResult
from d3pack.evaluate.charts import Series
from d3pack.evaluate.evaluation import Evaluation
from d3pack.preview import Row, contact_sheet, document, table
from d3pack.system.text import count, duration, size

_SHEET_CLASSES = 10


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def spread(mean: float, std: float, runs: int) -> str:
    """Mean and deviation; a single run has none."""
    return f"{percent(mean)} ± {percent(std)}" if runs > 1 else percent(mean)


def render(evaluation: Evaluation, *, name: str) -> str:
    """The whole page."""
    pack, ledger, facts = evaluation.pack, evaluation.ledger, evaluation.facts
    main = evaluation.results[0]
    cards = (
        (f"{percent(main.last.mean)} %", f"accuracy of a {facts['student']} trained on the pack"),
        (size(ledger.marginal), "the pack, with the backbone at hand"),
        *_private(evaluation),
        (size(ledger.everything), "with backbone and teacher"),
        (f"{ledger.break_even_marginal:,}", "JPEG files of the same weight as the pack"),
        (duration(evaluation.decode_seconds), f"to decode {len(pack):,} images here"),
    )
    listed = "".join(
        f"<li><strong>{escape(value)}</strong><span>{escape(what)}</span></li>"
        for value, what in cards
    )
    parts = [
        f"<header><h1>What {escape(name)} is worth</h1>",
        f'<p class="faint">identity <code>{pack.root}</code></p>',
        f"<p>Students ({escape(str(facts['student']))}) trained from scratch under the preset"
        f" <code>{escape(evaluation.preset.name)}</code>: {count(facts['updates'], 'update')} of"
        f" {facts['batch']} images at {facts['size']} px, {count(facts['seeds'], 'seed')},"
        f" tested on {facts['test_images']:,} real images. Every row had the same"
        " steps.</p></header>",
        f'<ul class="facts">{listed}</ul><main>',
        f"<h2>Accuracy per byte</h2>{_curve(evaluation)}",
        f"<h2>All rows</h2>{_rows(evaluation)}",
        _scores(evaluation.scores()),
        f"<h2>Where the bytes are</h2>{_ledger(evaluation)}",
        _sweep(evaluation.sweep),
        f"<h2>Images</h2>{_sheets(evaluation)}",
        f"<h2>Confusion of the student</h2>{_confusion(main, pack.classes)}",
        f"<h2>Protocol</h2>{_protocol(evaluation)}</main>",
    ]
    return document(f"d3pack eval: {name}", "\n".join(parts))


def _private(evaluation: Evaluation) -> list[tuple[str, str]]:
    """A card for a backbone that nobody else offers: a pack alone would be of no use."""
    ledger = evaluation.ledger
    if ledger.sent == ledger.pack:
        return []
    return [(size(ledger.sent), "with the backbone, which has no public home and is sent too")]


def _points(result: ArmResult, beside: int) -> Series:
    return Series(
        result.arm.title,
        [(result.mean_bytes or 0.0) + (beside if result.arm.needs_backbone else 0)],
        [result.last.mean],
        [result.last.std],
    )


def _curve(evaluation: Evaluation) -> str:
    beside = evaluation.ledger.sent - evaluation.ledger.pack
    placed = [r for r in evaluation.results if r.mean_bytes is not None]
    levels = {r.arm.title: r.last.mean for r in evaluation.results if r.mean_bytes is None}
    svg = charts.accuracy_per_byte(
        [_points(result, beside) for result in placed],
        levels=levels,
        chance=1 / len(evaluation.pack.classes),
        title="Accuracy against bytes sent, for the pack and every baseline",
    )
    said = ["Bytes that travel when the backbone is there already."]
    if beside:
        said = [
            f"The backbone, {size(beside)}, has no public home: it travels with the pack, is"
            " counted with every row that needs it, and real images may take as many bytes."
        ]
    if levels:
        said.append("Dashed: real images without loss, whose bytes nobody counted.")
    if evaluation.facts["seeds"] > 1:
        said.append("Bars: standard deviation over seeds.")
    return f"<figure>{svg}<figcaption>{' '.join(said)}</figcaption></figure>"


def _rows(evaluation: Evaluation) -> str:
    rows = []
    backbone = evaluation.ledger.backbone
    for result in evaluation.results:
        runs = len(result.histories)
        nbytes = result.mean_bytes
        whole = None if nbytes is None else nbytes + (backbone if result.arm.needs_backbone else 0)
        said = {note for note in result.notes if note}
        # Where epochs count, a set smaller than a batch is one batch: its steps show fewer images.
        batches = {history.batch for history in result.histories} - {evaluation.facts["batch"]}
        said |= {f"batches of {count(batch, 'image')}" for batch in batches}
        notes = "; ".join(sorted(said))
        title = escape(result.arm.title)
        title += f'<br><span class="faint">{escape(notes)}</span>' if notes else ""
        if result is evaluation.results[0]:
            title = f"<strong>{title}</strong>"
        rows.append(
            (
                title,
                f"{result.histories[0].images:,}",
                "-" if nbytes is None else size(nbytes),
                "-" if whole is None else size(whole),
                spread(result.last.mean, result.last.std, runs),
                spread(result.best.mean, result.best.std, runs),
                f"{sum(h.seconds for h in result.histories) / runs:.0f} s",
            )
        )
    head = ("trained on", "images", "bytes", "with backbone", "last, %", "best, %", "training")
    note = (
        '<p class="faint">last: at the end; best: the best test during training, as some papers'
        " report it."
    )
    if evaluation.facts["seeds"] > 1:
        note += " Both are mean ± standard deviation over seeds."
    note += "</p>"
    return table(head, rows, numbers=6) + note


def _scores(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    words = {
        "IOR": "improvement over as many random real images (higher is better)",
        "HLR": "hard-label loss against the whole real set (lower is better)",
        "LRS": "label-robust score of both (higher is better)",
    }
    rows = [
        (name, words[name], f"{value:.3f}" if name == "LRS" else f"{100 * value:+.1f}")
        for name, value in scores.items()
    ]
    return "<h2>DD-Ranking</h2>" + table(("score", "meaning", "value"), rows)


def _ledger(evaluation: Evaluation) -> str:
    ledger = evaluation.ledger
    whose = "shared by all packs" if evaluation.pack.recipe.backbone.repo else "beside the pack"
    rows = [(escape(name), f"{nbytes:,}") for name, nbytes in ledger.sections.items()]
    rows += [
        ("<strong>the pack (marginal)</strong>", f"<strong>{ledger.marginal:,}</strong>"),
        (f"backbone, {whose}", f"{ledger.backbone:,}"),
        (
            "teacher, needed only to encode",
            "-" if ledger.teacher is None else f"{ledger.teacher:,}",
        ),
        ("<strong>everything</strong>", f"<strong>{ledger.everything:,}</strong>"),
    ]
    return table(("part", "bytes"), rows) + (
        f'<p class="faint">A real image weighs {ledger.jpeg:.0f} bytes as a JPEG file of quality'
        f" 75. The pack weighs as much as {ledger.break_even_marginal:,} of them, pack, backbone"
        f" and teacher together as much as {ledger.break_even_everything:,}.</p>"
    )


def _sweep(points: Sequence[Mapping[str, Any]]) -> str:
    if not points:
        return ""
    front = [(p["bytes"], p["last"]["mean"]) for p in points if p["front"]]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(point["axis"], []).append(point)
    series = [
        Series(
            axis,
            [p["bytes"] for p in group],
            [p["last"]["mean"] for p in group],
            [p["last"]["std"] for p in group],
            line=False,
        )
        for axis, group in groups.items()
    ]
    svg = charts.accuracy_per_byte(
        series, title="Accuracy against bytes over the sweep", salt="sweep", front=front
    )
    rows = [
        (
            escape(p["title"]) + (" <strong>front</strong>" if p["front"] else ""),
            size(p["bytes"]),
            spread(p["last"]["mean"], p["last"]["std"], p["seeds"]),
        )
        for p in points
    ]
    head = ("variant", "bytes", "last, %")
    return f"<h2>Sweep</h2><figure>{svg}</figure>{table(head, rows, numbers=2)}"


def _sheets(evaluation: Evaluation) -> str:
    sheets, classes = evaluation.sheets, evaluation.pack.classes
    step = max(1, len(classes) // _SHEET_CLASSES)
    chosen = range(0, len(classes), step)[:_SHEET_CLASSES]
    kinds: list[tuple[str, Tensor | None]] = [
        ("Real images", sheets.real),
        ("This pack", sheets.pack),
        ("Class names as prompts", sheets.names),
    ]
    figures = []
    for title, images in kinds:
        if images is None:
            continue
        rows = [Row(classes[c], images[c].numpy()) for c in chosen]
        buffer = io.BytesIO()
        contact_sheet(rows, cell=64).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{title}: a row of'
            f' {images.shape[1]} images for each of {len(rows)} classes">'
            f"<figcaption>{title}</figcaption></figure>"
        )
    return f'<div class="side-by-side">{"".join(figures)}</div>'


def _confusion(result: ArmResult, classes: Sequence[str]) -> str:
    counts = np.sum([history.confusion for history in result.histories], axis=0)
    svg = charts.confusion(counts, classes, title="Confusion matrix of students on real images")
    answers = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = answers * (1 - np.eye(len(classes)))
    worst = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None)[:3], wrong.shape))[0]
    said = "; ".join(
        f"{classes[a]} taken for {classes[b]}: {100 * wrong[a, b]:.0f} %" for a, b in worst
    )
    return (
        f"<figure>{svg}<figcaption>Share of each class's test images, %, over all seeds, last"
        f" weights. Most often: {escape(said)}.</figcaption></figure>"
    )


def _protocol(evaluation: Evaluation) -> str:
    preset, facts, recipe = evaluation.preset, evaluation.facts, evaluation.pack.recipe
    ops = [*preset.pixel_ops, *preset.batch_ops, *([preset.mix] if preset.mix else [])]
    rows = [
        ("preset", f"{preset.name}: {preset.source}"),
        ("optimiser", repr(preset.optimizer)),
        ("schedule", repr(preset.schedule)),
        ("augmentation", ", ".join(map(repr, ops)) or "none"),
        ("labels", preset.labels),
        ("precision", f"{preset.precision}, {facts['device']}, threads: {facts['threads']}"),
        ("backbone", f"{recipe.backbone.repo or 'a directory'} {recipe.backbone.revision}"),
        (
            "sampler",
            f"{recipe.sampler}, {len(recipe.sigmas) - 1} steps, guidance {recipe.guidance:g},"
            f" {recipe.size[0]}x{recipe.size[1]} px",
        ),
        ("versions", f"d3pack {__version__}, torch {facts['torch']}"),
    ]
    return table(
        ("what", "value"),
        [(what, f"<code>{escape(str(value))}</code>") for what, value in rows],
        numbers=0,
    )
