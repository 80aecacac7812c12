"""The evaluation as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from d3pack import __version__
from d3pack.errors import NotFoundError, UsageError
from d3pack.evaluate import charts
from d3pack.evaluate.bench import EntryResult
from d3pack.evaluate.charts import Series
from d3pack.evaluate.evaluation import Evaluation
from d3pack.preview import Row, contact_sheet, document, table
from d3pack.system import count, duration, replace_file, require, size

_SHEET_CLASSES = 10  # that contact sheets show


def report_path(path: str | Path) -> Path:
    """Return a path where `write_report` can write.

    Raises:
        UsageError: if the name does not end in .html or .htm, or matplotlib is missing.
        NotFoundError: if its directory does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"invalid report {path.name!r}: expected a name that ends in .html")
    if not path.parent.is_dir():
        raise NotFoundError(f"{path.parent} is not a directory", hint="create it first")
    require("matplotlib", "a report")
    return path


def write_report(evaluation: Evaluation, path: str | Path) -> None:
    """Write an evaluation as one HTML page, with charts, images and the protocol.

    Args:
        evaluation: what `evaluate` returned.
        path: name of the page; it ends in .html.

    Raises:
        UsageError: if the name does not end in .html or .htm.
        NotFoundError: if its directory does not exist.

    Example:
        >>> from d3pack.evaluate import evaluate, write_report
        >>> evaluation = evaluate("cifar10.d3m", "cifar10/")  # doctest: +SKIP
        >>> write_report(evaluation, "report.html")  # doctest: +SKIP
    """
    replace_file(report_path(path), render(evaluation).encode())


def render(evaluation: Evaluation) -> str:
    """Return the page."""
    name, pack, main = escape(evaluation.name), evaluation.pack, evaluation.results[0]
    facts = evaluation.facts
    parts = [
        f"<header><h1>Evaluation of {name}</h1>",
        f'<p class="faint">pack <code>{pack.root}</code></p>',
        f"<p>Students ({escape(str(facts['student']))}) were trained from scratch under the"
        f" protocol <code>{escape(evaluation.protocol.name)}</code>:"
        f" {count(facts['updates'], 'update')} of {facts['batch']} images at {facts['size']} px,"
        f" {count(facts['seeds'], 'seed')}, tested on {facts['test_images']:,} real images. "
        f"{_updates(evaluation)}</p></header>",
        f'<ul class="facts">{_cards(evaluation)}</ul><main>',
        f"<h2>Accuracy per byte</h2>{_curve(evaluation)}",
        f"<h2>All entries</h2>{_rows(evaluation)}",
        _scores(evaluation.scores()),
        f"<h2>Bytes of the pack</h2>{_ledger(evaluation)}",
        _sweep(evaluation.sweep),
        f"<h2>Images</h2>{_images(evaluation)}",
        f"<h2>Confusion matrix</h2>{_confusion(main, pack.classes)}",
        f"<h2>Protocol</h2>{_protocol(evaluation)}</main>",
    ]
    return document(f"d3pack eval: {evaluation.name}", "\n".join(parts))


def _updates(evaluation: Evaluation) -> str:
    """What rows have in common, and which has not."""
    whole = next((result for result in evaluation.results if result.entry.whole), None)
    text = "Every row of the table had the same number of updates"
    if whole is None:
        return text + "."
    if evaluation.protocol.whole is not None:
        return f"{text}, but for all real images, for which the protocol has its own schedule."
    return f"{text}: all real images would teach more with more of them, and are no upper bound."


def _cards(evaluation: Evaluation) -> str:
    ledger, main = evaluation.ledger, evaluation.results[0]
    student = evaluation.facts["student"]
    cards = [
        (f"{_percent(main.last.mean)} %", f"accuracy of a {student} trained on the pack"),
        (size(ledger.marginal), "the pack alone, for who has the backbone"),
        (size(ledger.everything), "the pack with backbone and teacher"),
        (f"{ledger.break_even_marginal:,}", "JPEG files weigh as much as the pack"),
        (
            duration(evaluation.decode_seconds),
            f"to decode {len(evaluation.pack):,} images on this machine",
        ),
    ]
    if ledger.sent != ledger.pack:
        what = "the pack with its backbone, which is not public"
        cards.insert(2, (size(ledger.sent), what))
    return "".join(
        f"<li><strong>{escape(value)}</strong><span>{escape(what)}</span></li>"
        for value, what in cards
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _spread(mean: float, std: float, runs: int) -> str:
    """Mean and deviation; a single run has no deviation."""
    return f"{_percent(mean)} ± {_percent(std)}" if runs > 1 else _percent(mean)


def _points(result: EntryResult, backbone: int) -> Series:
    return Series(
        result.entry.title,
        [(result.mean_bytes or 0.0) + (backbone if result.needs_backbone else 0)],
        [result.last.mean],
        [result.last.std],
    )


def _curve(evaluation: Evaluation) -> str:
    backbone = evaluation.ledger.sent - evaluation.ledger.pack
    placed = [r for r in evaluation.results if r.mean_bytes is not None]
    levels = {r.entry.title: r.last.mean for r in evaluation.results if r.mean_bytes is None}
    svg = charts.accuracy_per_byte(
        [_points(result, backbone) for result in placed],
        levels=levels,
        chance=1 / len(evaluation.pack.classes),
        title="Accuracy against bytes sent, for the pack and every baseline",
    )
    notes = ["Bytes to send to somebody who has the backbone already."]
    if backbone:
        notes = [
            f"The backbone, {size(backbone)}, is not public: it is sent with the"
            " pack and counted for every entry that needs it, and real images may take as many"
            " bytes as both."
        ]
    if levels:
        notes.append(
            "Dashed: real images without loss, which nobody would send; bytes not counted."
        )
    if evaluation.facts["seeds"] > 1:
        notes.append("Bars: standard deviation over seeds.")
    return f"<figure>{svg}<figcaption>{' '.join(notes)}</figcaption></figure>"


def _rows(evaluation: Evaluation) -> str:
    rows = []
    for result in evaluation.results:
        runs = len(result.histories)
        nbytes = result.mean_bytes
        backbone = evaluation.ledger.backbone if result.needs_backbone else 0
        title = escape(result.entry.title)
        if notes := _notes(result, evaluation.facts["batch"]):
            title += f'<br><span class="faint">{escape(notes)}</span>'
        if result is evaluation.results[0]:
            title = f"<strong>{title}</strong>"
        rows.append(
            (
                title,
                f"{result.histories[0].images:,}",
                "-" if nbytes is None else size(nbytes),
                "-" if nbytes is None else size(nbytes + backbone),
                _spread(result.last.mean, result.last.std, runs),
                _spread(result.best.mean, result.best.std, runs),
                f"{sum(h.seconds for h in result.histories) / runs:.0f} s",
            )
        )
    head = ("trained on", "images", "bytes", "with backbone", "last, %", "best, %", "training")
    note = "last: accuracy after the last update; best: the best during training."
    if evaluation.facts["seeds"] > 1:
        note += " Both are mean ± standard deviation over seeds."
    return table(head, rows, numbers=6) + f'<p class="faint">{note}</p>'


def _notes(result: EntryResult, batch: int) -> str:
    notes = {note for note in result.notes if note}
    # Where epochs count, a set smaller than a batch is one batch: its steps show fewer images.
    others = {history.batch for history in result.histories} - {batch}
    return "; ".join(sorted(notes | {f"batches of {count(n, 'image')}" for n in others}))


def _scores(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    meanings = {
        "IOR": "improvement over as many random real images, best tests (higher is better)",
        "HLR": "loss against the whole real set, hard labels, best tests (lower is better)",
        "LRS": "label-robust score of both (higher is better)",
    }
    rows = [
        (name, meanings[name], f"{value:.3f}" if name == "LRS" else f"{100 * value:+.1f}")
        for name, value in scores.items()
    ]
    return "<h2>DD-Ranking</h2>" + table(("score", "meaning", "value"), rows)


def _ledger(evaluation: Evaluation) -> str:
    ledger = evaluation.ledger
    public = bool(evaluation.pack.recipe.backbone.repo)
    backbone = "backbone, shared by all packs" if public else "backbone, sent with the pack"
    teacher = "-" if ledger.teacher is None else f"{ledger.teacher:,}"
    rows = [(escape(name), f"{nbytes:,}") for name, nbytes in ledger.sections.items()]
    rows += [
        ("<strong>the pack</strong>", f"<strong>{ledger.marginal:,}</strong>"),
        (backbone, f"{ledger.backbone:,}"),
        ("teacher, needed only to encode", teacher),
        ("<strong>everything</strong>", f"<strong>{ledger.everything:,}</strong>"),
    ]
    return table(("part", "bytes"), rows) + (
        f'<p class="faint">A real image takes {ledger.jpeg:.0f} bytes as a JPEG file of quality'
        f" 75. The pack weighs as much as {ledger.break_even_marginal:,} of them; pack, backbone"
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
            _spread(p["last"]["mean"], p["last"]["std"], p["seeds"]),
        )
        for p in points
    ]
    head = ("variant", "bytes", "last, %")
    return f"<h2>Sweep</h2><figure>{svg}</figure>{table(head, rows, numbers=2)}"


def _images(evaluation: Evaluation) -> str:
    classes = evaluation.pack.classes
    step = max(1, len(classes) // _SHEET_CLASSES)
    chosen = range(0, len(classes), step)[:_SHEET_CLASSES]
    figures = []
    for title, images in evaluation.images.items():
        rows = [Row(classes[c], images[c].numpy()) for c in chosen]
        buffer = io.BytesIO()
        contact_sheet(rows, cell=64).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = escape(title[:1].upper() + title[1:])
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}: a row of'
            f' {images.shape[1]} images for each of {len(rows)} classes">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="side-by-side">{"".join(figures)}</div>'


def _confusion(result: EntryResult, classes: Sequence[str]) -> str:
    counts = np.sum([history.confusion for history in result.histories], axis=0)
    svg = charts.confusion(counts, classes, title="Confusion matrix of students on real images")
    answers = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = answers * (1 - np.eye(len(classes)))
    worst = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None)[:3], wrong.shape))[0]
    listed = "; ".join(
        f"{classes[a]} taken for {classes[b]}: {100 * wrong[a, b]:.0f} %"
        for a, b in worst
        if wrong[a, b] > 0
    )
    most = f" Most frequent errors: {escape(listed)}." if listed else ""
    return (
        f"<figure>{svg}<figcaption>Answers of students that were trained on the pack, as shares of"
        f" each class's test images in %, over all seeds.{most}</figcaption></figure>"
    )


def _protocol(evaluation: Evaluation) -> str:
    protocol, facts, recipe = evaluation.protocol, evaluation.facts, evaluation.pack.recipe
    ops = [*protocol.pixel_ops, *protocol.batch_ops, *([protocol.mix] if protocol.mix else [])]
    rows = [
        ("protocol", f"{protocol.name}: {protocol.source}"),
        ("optimiser", repr(protocol.optimizer)),
        ("schedule", repr(protocol.schedule)),
        ("augmentation", ", ".join(map(repr, ops)) or "none"),
        ("labels", protocol.labels),
        ("precision", f"{protocol.precision}, {facts['device']}, threads: {facts['threads']}"),
        ("backbone", f"{recipe.backbone.repo or 'a directory'} {recipe.backbone.revision}"),
        (
            "sampler",
            f"{evaluation.pack.sampling}, {recipe.size[0]}x{recipe.size[1]} px",
        ),
        ("versions", f"d3pack {__version__}, torch {facts['torch']}"),
    ]
    return table(
        ("what", "value"),
        [(what, f"<code>{escape(str(value))}</code>") for what, value in rows],
        numbers=0,
    )
