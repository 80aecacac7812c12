"""From a draft to a pack: picks, soft labels, probes, provenance, contact sheets."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

import d3pack
from d3pack.backbones import Backbone
from d3pack.decode import Decoder, make_probes
from d3pack.encode.allocation import PROBE, Allocation, expected_bytes
from d3pack.encode.candidates import (
    Answers,
    agreement,
    ask_teacher,
    candidates_of,
    lanes_of,
    pick_order,
    probabilities,
)
from d3pack.encode.codes import choose_photographs, latents_of, with_codes
from d3pack.encode.contract import Draft, EncodeRun, ShardFinishedError
from d3pack.encode.pilots import choose_split
from d3pack.encode.plan import EncodePlan
from d3pack.encode.sets import with_sets
from d3pack.encode.settings import EncodeSettings, parse_labels, recorded_settings
from d3pack.errors import UsageError
from d3pack.format import Pack, encode_labels, encode_picks, encode_weights
from d3pack.preview import Row, contact_sheet
from d3pack.sources import Source
from d3pack.system import Journal
from d3pack.teachers import Teacher

SHEET_IMAGES = 4  # of a class
SHEET_ROWS = 20
MANY = 100  # classes; sheets of more show one image of each


def finish(run: EncodeRun, plan: EncodePlan, draft: Draft, method: str) -> Pack:
    """Return the pack of a draft; what a killed run has finished is not done again.

    Raises:
        ShardFinishedError: the run is a shard, and has done its share.
        WaitingError: the run is a shard, and needs what others do.
    """
    if plan.pilots:
        plan = _split(run, plan, draft, method)
    allocation, backbone = plan.allocation, draft.backbone
    pack = _with_images(run, plan, draft, method, last=allocation.labels == "none")
    metrics = dict(draft.metrics)
    if allocation.labels != "none":
        teacher = _teacher_of(draft, method)
        answers = ask_teacher(run, pack, backbone, teacher, "labels", last=True)
        metrics["agreement"] = agreement(answers, len(pack.classes))
        pack = with_labels(pack, answers, allocation.labels, run.settings.label_temperature)
    if run.is_shard:
        raise ShardFinishedError(f"shard {run.shard} has finished")
    if draft.weights is not None:
        weights = np.stack([draft.weights(c) for c in range(len(pack.classes))])
        pack = replace(pack, weights=encode_weights(weights))
    pack = with_probes(pack, backbone, allocation.probes)
    record = provenance(
        method,
        run.source,
        run.settings,
        teacher=draft.teacher.record if draft.teacher else None,
        metrics=metrics,
        seen=draft.seen,
        bad=draft.bad,
        fingerprint=run.source.fingerprint(),
        coding=coding_figures(pack),
    )
    if draft.real is not None:
        files = write_sheets(pack, backbone, draft.real, draft.title, run.journal)
        run.events.emit("sheets", files=files)
    return replace(pack, provenance=record)


def _split(run: EncodeRun, plan: EncodePlan, draft: Draft, method: str) -> EncodePlan:
    """Return the plan whose split between seeds and codes is the best."""
    assert draft.prompts is not None  # seeds are always among what is compared
    width = draft.prompts.shape[-1]
    record = sample_provenance(method, run.source, run.settings, tuple(draft.metrics), {})

    def size_of(plan: EncodePlan) -> int:
        none = draft.unconditional is not None
        return expected_bytes(
            plan,
            draft.recipe,
            width,
            plan.allocation,
            record,
            unconditional=none,
            adapter=draft.adapter,
        )

    make = partial(_with_images, run, draft=draft, method=method)
    return choose_split(run, plan, draft.backbone, make, size_of)


def _with_images(
    run: EncodeRun, plan: EncodePlan, draft: Draft, method: str, *, last: bool = False
) -> Pack:
    """Return the pack of a draft with picked seeds and codes, as the plan has them.

    Args:
        last: whether a shard has nothing to do after this.
    """
    pack, backbone = draft.pack(plan), draft.backbone
    if plan.allocation.candidates > 1 and plan.seeded:
        teacher = partial(_teacher_of, draft, method)
        alone = last and not plan.codes
        if plan.allocation.select == "teacher":
            pack = _with_picks(run, pack, plan.allocation, backbone, teacher(), last=alone)
        else:
            pack = with_sets(run, plan, pack, backbone, teacher, last=alone)
    if plan.codes:
        latents = draft.latents or _latents_of_photographs(run, plan, draft, method)
        pack = with_codes(run, plan, pack, backbone, latents, last=last)
    return pack


def _latents_of_photographs(
    run: EncodeRun, plan: EncodePlan, draft: Draft, method: str
) -> Callable[[int], Tensor]:
    photographs = draft.photographs
    if photographs is None:
        photographs = partial(choose_photographs, run, plan, _teacher_of(draft, method))
    return lambda c: latents_of(draft.backbone, photographs(c))


def _teacher_of(draft: Draft, method: str) -> Teacher:
    if draft.teacher is None:
        raise UsageError(
            f"the method {method} has no teacher to pick or label images",
            hint="set candidates to 1, codes to 0 and labels to none",
        )
    return draft.teacher


def _with_picks(
    run: EncodeRun,
    pack: Pack,
    allocation: Allocation,
    backbone: Backbone,
    teacher: Teacher,
    *,
    last: bool,
) -> Pack:
    """Make candidates and keep the best."""
    count = pack.images_per_class
    lanes = lanes_of(count, allocation.modes, allocation.share)
    total = candidates_of(count, allocation.modes, allocation.candidates, allocation.share)
    many = replace(pack, images_per_class=total)
    folder = f"candidates/{total}"  # pilots may ask for several numbers
    answers = ask_teacher(run, many, backbone, teacher, folder, last=last)
    orders = [pick_order(answers(c), c, count, lanes) for c in range(len(pack.classes))]
    return replace(pack, picks=encode_picks(orders, lanes))


def with_labels(
    pack: Pack, answers: Callable[[int], Answers], labels: str, temperature: float
) -> Pack:
    """Return the pack with the teacher's answers on its own images."""
    kind, k = parse_labels(labels)
    probs = np.stack(
        [probabilities(answers(c).logits, temperature) for c in range(len(pack.classes))]
    )
    if kind == "dense":
        return replace(pack, labels=encode_labels(probs, "dense"))
    return replace(pack, labels=encode_labels(probs, "topk", k=k))


def with_probes(pack: Pack, backbone: Backbone, count: int) -> Pack:
    """Return the pack with `count` small reference images, spread over the classes."""
    count = min(count, len(pack))
    if not count:
        return pack
    pairs = spread(len(pack.classes), count)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    height, width = pack.recipe.size
    size = (PROBE if height % PROBE == 0 else 1, PROBE if width % PROBE == 0 else 1)
    return replace(pack, probes=make_probes(decoder, pairs, size))


def spread(classes: int, count: int) -> list[tuple[int, int]]:
    """Return `count` different images (class, number), of as many classes as possible."""
    if count <= classes:
        return [(int(c), 0) for c in np.linspace(0, classes - 1, count).astype(int)]
    return sorted((i % classes, i // classes) for i in range(count))


def release(version: str) -> str:
    """Return a released version as it is, and "dev" for what lies between releases.

    Two checkouts of the same code, one of them without its tags, write the same bytes.
    """
    return "dev" if ".dev" in version or "+" in version else version


def provenance(
    method: str,
    source: Source,
    settings: EncodeSettings,
    *,
    teacher: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
    seen: int,
    bad: int,
    fingerprint: str,
    coding: Mapping[str, Any],
) -> dict[str, Any]:
    """Return where a pack comes from, without local paths, names of people and times.

    A lean one has what a person, a ledger or a sweep asks for, without empty parts.
    """
    options = recorded_settings(settings, method)
    teacher = dict(teacher or {})
    images = sum(source.counts)
    if settings.provenance == "lean":
        options.pop("images_per_class", None)  # the pack has as many
        value = {
            "d3pack": release(d3pack.__version__),
            "method": method,
            "options": options,
            "source": {"images": images},
            "teacher": {"bytes": teacher["bytes"]} if teacher else {},
        }
        return {name: part for name, part in value.items() if part}
    value = {
        "method": method,
        "options": options,
        "source": {
            "kind": source.kind,
            "sha256": fingerprint,
            "images": images,
            "seen": seen,
            "bad": bad + source.refused,
        },
        "metrics": dict(metrics),
        "coding": dict(coding),
        "versions": {
            "d3pack": release(d3pack.__version__),
            "torch": importlib.metadata.version("torch"),
            "diffusers": importlib.metadata.version("diffusers"),
        },
    }
    return {**value, "teacher": teacher} if teacher else value


def coding_figures(pack: Pack) -> dict[str, Any]:
    """Return what the codecs lost, as they measured it."""
    sections = {"prompts": pack.prompts, "labels": pack.labels, "adapter": pack.adapter}
    return {name: dict(coded.figures) for name, coded in sections.items() if coded is not None}


_SAMPLE_TEACHER: Mapping[str, Any] = {
    "kind": "trained",
    "name": "resnet-48-96-192-32px",
    "bytes": 2778952,
    "sha256": "0" * 32,
    "held_accuracy": 0.1234,
}


def sample_provenance(
    method: str,
    source: Source,
    settings: EncodeSettings,
    figures: Sequence[str],
    counts: Mapping[str, int],
    seen: int | None = None,
    *,
    teaches: bool = True,
) -> dict[str, Any]:
    """Return provenance as long as the real one will be, for the size of a pack to come.

    Args:
        method: name of the method.
        source: the real images.
        settings: what the user chose.
        figures: names of measured numbers.
        counts: metrics that are whole numbers.
        seen: images that will be used; by default all.
        teaches: whether there is a teacher.
    """
    labelled = ["agreement"] if settings.labels else []
    return provenance(
        method,
        source,
        settings,
        teacher=_SAMPLE_TEACHER if teaches else None,
        metrics={**dict.fromkeys([*figures, *labelled], 0.12345), **counts},
        seen=sum(source.counts) if seen is None else seen,
        bad=0,
        fingerprint="0" * 64,
        coding={"prompts": {"error": {"rms": 0.12345, "worst": 0.12345}}},
    )


def write_sheets(
    pack: Pack,
    backbone: Backbone,
    real: Callable[[int, int], Any],
    title: str,
    journal: Journal,
) -> list[str]:
    """Write sheets of real and generated images, 20 classes each; return the file names."""
    count = min(SHEET_IMAGES if len(pack.classes) <= MANY else 1, pack.images_per_class)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    names = []
    for first in range(0, len(pack.classes), SHEET_ROWS):
        classes = range(first, min(first + SHEET_ROWS, len(pack.classes)))
        images = decoder.images([(c, i) for c in classes for i in range(count)]).cpu().numpy()
        images = images.reshape(len(classes), count, *images.shape[1:])
        rows = [
            # the real ones may be of another size
            Row(pack.classes[c], [*real(c, SHEET_IMAGES), *images[place]])
            for place, c in enumerate(classes)
        ]
        captions = ["real"] + [""] * (len(rows[0].images) - count - 1) + ["made"]
        names.append(f"sheets/{first:06d}.png")
        contact_sheet(rows, title=title, captions=captions).save(journal.path(names[-1]))
    return names
