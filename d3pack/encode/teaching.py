"""The teacher that the settings name, for every method."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from d3pack.encode.contract import EncodeRun
from d3pack.encode.plan import EncodePlan
from d3pack.encode.settings import EncodeSettings
from d3pack.errors import NotFoundError, UsageError
from d3pack.sources import read_table
from d3pack.system import replace_file
from d3pack.teachers import (
    SAMPLES,
    Teacher,
    TeacherConfig,
    TransformersTeacher,
    cache_or_work,
    check_teacher,
    teacher_config,
    teacher_key,
    train_teacher,
)

CHOOSING = 12_500  # images a class that a teacher learns from to choose patches, and nothing else
_KEY = "teacher key"  # in the journal: which teacher of the cache the run began with
_WEIGHTS = "teacher.safetensors"  # in the journal of the shard that has trained it for all


def check_named_teacher(settings: EncodeSettings, classes: Sequence[str]) -> None:
    """Refuse a teacher that is not there or has other labels, and a table of one to be trained.

    Raises:
        TeacherError: the name is neither that of a directory nor of a repository, or, where it is
            here, a class has no label.
        SourceError: the table is none.
        UsageError: the table is that of a teacher to be trained.
        NotFoundError: there is no such table.
    """
    table = settings.teacher_map
    if table is not None and not table.is_file():
        raise NotFoundError(f"there is no table of labels {table}")
    if settings.teacher != "train":
        check_teacher(settings.teacher, classes, None if table is None else read_table(table))
    elif table is not None:
        raise UsageError("teacher_map needs a teacher", hint="name one with teacher")


def small_teacher(
    plan: EncodePlan, settings: EncodeSettings, device: str, *, choosing: bool = False
) -> TeacherConfig:
    """Return how a small teacher of the plan's source is trained.

    Args:
        plan: of the job.
        settings: what the user has set stays as it is.
        device: where it is trained.
        choosing: whether it only tells which photographs are typical of their class, which takes
            less than to pick or label images: prompts learned from these teach as much.
    """
    samples = SAMPLES if settings.teacher_samples is None else settings.teacher_samples
    config = teacher_config(plan.typical, samples, settings.seed, device)
    if settings.teacher_samples is None and choosing:
        config = replace(config, samples=min(config.samples, CHOOSING * len(plan.classes)))
    return config


def open_teacher(run: EncodeRun, plan: EncodePlan, *, choosing: bool = False) -> Teacher:
    """Return a teacher trained on the source's images, or a `transformers` classifier.

    A run that goes on must have the teacher that it began with, whatever its path holds now.

    Args:
        run: the run.
        plan: its plan.
        choosing: whether it only tells which photographs are typical of their class.
    """
    teacher = _open(run, plan, choosing)
    _check_same(run, "teacher", str(teacher.record["sha256"]))
    if run.settings.teacher_map is not None:
        table = run.settings.teacher_map.read_bytes()
        _check_same(run, "teacher map", hashlib.sha256(table).hexdigest())
    return teacher


def _check_same(run: EncodeRun, name: str, digest: str) -> None:
    if name not in run.journal:
        run.journal.record(name, digest)
    elif run.journal[name] != digest:
        raise UsageError(
            f"the {name} has changed since this work began",
            hint="put it back to go on, or use --restart (restart=True) to begin anew",
        )


def _open(run: EncodeRun, plan: EncodePlan, choosing: bool) -> Teacher:
    settings, journal, context = run.settings, run.journal, run.context
    table = settings.teacher_map
    if settings.teacher != "train":
        if settings.teacher not in context.opened:
            context.opened[settings.teacher] = TransformersTeacher(
                settings.teacher,
                run.source.classes,
                table=None if table is None else str(table),
                device=context.device,
            )
        return context.opened[settings.teacher]
    config = small_teacher(plan, settings, context.device, choosing=choosing)
    key = teacher_key(run.source, config, context.device)
    known = [journal[_KEY]] if _KEY in journal else []
    cache = cache_or_work(context.teachers, journal, run.events, [*known, key])
    if not run.once("train the teacher", _KEY):
        cached, weights = cache / f"{journal[_KEY]}.safetensors", journal.find(_WEIGHTS)
        if weights is not None and not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached, weights.read_bytes())
        if cached.exists():
            key = journal[_KEY]  # also where threads or torch are others now
    teacher = train_teacher(
        run.source,
        config,
        journal,
        run.events,
        cache=cache,
        device=context.device,
        key=key,
    )
    run.remember_skipped()
    if _KEY not in journal:
        if run.is_shard:
            trained = cache / f"{key}.safetensors"
            replace_file(journal.path(_WEIGHTS), trained.read_bytes())
        journal.record(_KEY, key)
    return teacher
