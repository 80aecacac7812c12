"""The teacher that the options name, for every method."""

from __future__ import annotations

from pathlib import Path

from d3pack.backbones import cache_home
from d3pack.encode.method import Run
from d3pack.encode.teachers.resnet import lesson_for, train_teacher
from d3pack.encode.teachers.teacher import Teacher, TransformersTeacher
from d3pack.errors import UsageError


def open_teacher(run: Run, typical: int) -> Teacher:
    """Trained here on images of that shorter side, or a `transformers` classifier."""
    options = run.options
    if options.teacher != "train":
        return TransformersTeacher(
            options.teacher, run.source.classes, table=options.teacher_map, device=run.device
        )
    if options.teacher_map is not None:
        raise UsageError("--teacher-map needs a teacher", hint="name one with --teacher")
    lesson = lesson_for(typical, options.teacher_samples, options.seed, run.device)
    return train_teacher(
        run.source, lesson, run.journal, run.events, cache=run.cache, device=run.device
    )


def teacher_cache() -> Path:
    """Where trained teachers are remembered."""
    return cache_home() / "teachers"
