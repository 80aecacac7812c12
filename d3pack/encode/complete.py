"""The last stages, the same for every method: seeds, soft labels, probes, provenance, sheets."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import d3pack
from d3pack.backbones import Backbone
from d3pack.decode import Decoder, make_probes
from d3pack.encode.generate import SHOWN, Judged, agreement, judge_images, probabilities
from d3pack.encode.method import Run
from d3pack.encode.options import EncodeOptions, label_kind
from d3pack.encode.plan import PROBE, Dials
from d3pack.encode.seeds import candidates_of, choose_order, lanes_of
from d3pack.format.codecs import encode_labels, encode_picks
from d3pack.format.pack import Pack
from d3pack.preview import Row, contact_sheet
from d3pack.sources import Source
from d3pack.system.journal import Journal
from d3pack.teachers import Teacher

Images = npt.NDArray[np.uint8]
SHEET_ROWS = 20
MANY = 100  # classes; beyond, one image of each is shown
_PRIVATE = ("backbone", "teacher", "teacher_map", "device")  # may name a place on this machine
_PRIVATE_SETTINGS = ("vae",)


@dataclass(frozen=True, slots=True)
class Told:
    """What a method says about its own work."""

    method: str
    metrics: Mapping[str, Any]
    seen: int
    bad: int
    shown: Callable[[int], Images]  # real images of a class, for the contact sheet
    title: str


def finish(
    run: Run, pack: Pack, dials: Dials, backbone: Backbone, teacher: Teacher, told: Told
) -> Pack:
    """From prompts to the whole pack; each stage goes on where it was stopped."""
    metrics = dict(told.metrics)
    if dials.candidates > 1:
        pack = _with_picks(run, pack, dials, backbone, teacher)
    if dials.labels != "none":
        judged = judge_images(pack, backbone, teacher, run.journal, run.events, "labels")
        metrics["agreement"] = agreement(judged, len(pack.classes))
        pack = with_labels(pack, judged, dials.labels, run.options.label_temperature)
    pack = with_probes(pack, backbone, dials.probes)
    record = provenance(
        told.method,
        run.source,
        run.options,
        teacher=teacher.record,
        metrics=metrics,
        seen=told.seen,
        bad=told.bad,
        fingerprint=run.source.fingerprint(),
    )
    sheets = write_sheets(pack, backbone, told, run.journal)
    run.events.emit("sheets", files=list(sheets))
    return replace(pack, provenance=record)


def _with_picks(run: Run, pack: Pack, dials: Dials, backbone: Backbone, teacher: Teacher) -> Pack:
    """Make candidates, keep the best."""
    count = pack.images_per_class
    lanes = lanes_of(count, dials.modes, dials.share)
    every = candidates_of(count, dials.modes, dials.candidates, dials.share)
    many = replace(pack, images_per_class=every)
    judged = judge_images(many, backbone, teacher, run.journal, run.events, "candidates")
    orders = [choose_order(judged(c), c, count, lanes) for c in range(len(pack.classes))]
    return replace(pack, picks=encode_picks(orders, lanes))


def with_labels(
    pack: Pack, judged: Callable[[int], Judged], labels: str, temperature: float
) -> Pack:
    """The pack with the teacher's answers on its own images."""
    kind, k = label_kind(labels)
    probs = np.stack(
        [probabilities(judged(c).logits, temperature) for c in range(len(pack.classes))]
    )
    if kind == "dense":
        return replace(pack, labels=encode_labels(probs, "dense"))
    return replace(pack, labels=encode_labels(probs, "topk", k=k))


def with_probes(pack: Pack, backbone: Backbone, count: int) -> Pack:
    """The pack with `count` small reference images, spread over the classes."""
    count = min(count, len(pack))
    if not count:
        return pack
    pairs = spread(len(pack.classes), count)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    height, width = pack.recipe.size
    size = (PROBE if height % PROBE == 0 else 1, PROBE if width % PROBE == 0 else 1)
    return replace(pack, probes=make_probes(decoder, pairs, size))


def spread(classes: int, count: int) -> list[tuple[int, int]]:
    """So many different images (class, number): as many classes as there are, then more of each."""
    if count <= classes:
        return [(int(c), 0) for c in np.linspace(0, classes - 1, count).astype(int)]
    return sorted((i % classes, i // classes) for i in range(count))


def provenance(
    method: str,
    source: Source,
    options: EncodeOptions,
    *,
    teacher: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
    seen: int,
    bad: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Where a pack comes from: no local paths, no names of people, no times."""
    chosen = {k: v for k, v in options.plain().items() if k not in (*_PRIVATE, "method")}
    if "extra" in chosen:
        chosen["extra"] = {k: v for k, v in options.extra.items() if k not in _PRIVATE_SETTINGS}
    value: dict[str, Any] = {
        "method": method,
        "options": chosen,
        "source": {
            "kind": source.kind,
            "sha256": fingerprint,
            "images": sum(source.counts),
            "seen": seen,
            "bad": bad + source.refused,
        },
        "metrics": dict(metrics),
        "versions": {
            "d3pack": d3pack.__version__,
            "torch": importlib.metadata.version("torch"),
            "diffusers": importlib.metadata.version("diffusers"),
        },
    }
    if teacher is not None:
        value["teacher"] = dict(teacher)
    return value


def sample_record(
    method: str,
    source: Source,
    options: EncodeOptions,
    figures: Sequence[str],
    counts: Mapping[str, int],
    seen: int | None = None,
) -> dict[str, Any]:
    """Provenance as long as the real one will be: for the size of a pack before it is made."""
    return provenance(
        method,
        source,
        options,
        teacher={
            "kind": "trained",
            "name": "resnet-48-96-192-32px",
            "bytes": 2778952,
            "sha256": "0" * 32,
            "held_accuracy": 0.1234,
        },
        metrics={**dict.fromkeys(figures, 0.12345), **counts},
        seen=sum(source.counts) if seen is None else seen,
        bad=0,
        fingerprint="0" * 64,
    )


def write_sheets(pack: Pack, backbone: Backbone, told: Told, journal: Journal) -> Sequence[str]:
    """Real images beside generated ones, 20 classes a sheet; the names of the files."""
    shown = min(SHOWN if len(pack.classes) <= MANY else 1, pack.images_per_class)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    names = []
    for first in range(0, len(pack.classes), SHEET_ROWS):
        rows = range(first, min(first + SHEET_ROWS, len(pack.classes)))
        made = decoder.images([(c, i) for c in rows for i in range(shown)]).cpu().numpy()
        made = made.reshape(len(rows), shown, *made.shape[1:])
        lines = [
            Row(pack.classes[c], [*told.shown(c)[:SHOWN], *made[place]])  # of two sizes, maybe
            for place, c in enumerate(rows)
        ]
        captions = ["real"] + [""] * (len(lines[0].images) - shown - 1) + ["made"]
        names.append(f"sheets/{first:06d}.png")
        sheet = contact_sheet(lines, title=told.title, captions=captions)
        sheet.save(journal.path(names[-1]))
    return names
