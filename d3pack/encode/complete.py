"""The last touches, the same for every method: soft labels, probes, provenance, contact sheets."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

import d3pack
from d3pack.backbones import Backbone
from d3pack.codecs import encode_labels
from d3pack.decode import Decoder, make_probes
from d3pack.encode.generate import SHOWN, Judged, probabilities
from d3pack.encode.journal import Journal
from d3pack.encode.options import EncodeOptions, label_kind
from d3pack.pack import Pack
from d3pack.sheet import Row, contact_sheet
from d3pack.sources import Source

Images = npt.NDArray[np.uint8]
PROBE = 8  # side of a stored probe, where the image size allows it
SHEET_ROWS = 20
MANY = 100  # classes; beyond, one image of each is shown
_PRIVATE = ("backbone", "teacher", "teacher_map", "device")  # may name a place on this machine


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
    classes = np.linspace(0, len(pack.classes) - 1, count).astype(int)
    pairs = [(int(c), i // len(pack.classes)) for i, c in enumerate(classes)]
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    height, width = pack.recipe.size
    size = (PROBE if height % PROBE == 0 else 1, PROBE if width % PROBE == 0 else 1)
    return replace(pack, probes=make_probes(decoder, sorted(set(pairs)), size))


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


def write_sheets(
    pack: Pack, backbone: Backbone, real: Callable[[int], Images], journal: Journal
) -> Sequence[str]:
    """Collages beside generated images, 20 classes a sheet; the names of the files."""
    shown = min(SHOWN if len(pack.classes) <= MANY else 1, pack.images_per_class)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    names = []
    for first in range(0, len(pack.classes), SHEET_ROWS):
        rows = range(first, min(first + SHEET_ROWS, len(pack.classes)))
        made = decoder.images([(c, i) for c in rows for i in range(shown)]).cpu().numpy()
        made = made.reshape(len(rows), shown, *made.shape[1:])
        lines = [
            Row(pack.classes[c], np.concatenate([real(c)[:SHOWN], made[place]]))
            for place, c in enumerate(rows)
        ]
        captions = ["real"] + [""] * (len(lines[0].images) - shown - 1) + ["made"]
        names.append(f"sheets/{first:06d}.png")
        sheet = contact_sheet(
            lines, title="Collages of real patches, and what the pack makes", captions=captions
        )
        sheet.save(journal.path(names[-1]))
    return names
