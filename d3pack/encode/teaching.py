"""The teacher that the options name, for every method."""

from __future__ import annotations

import hashlib
from pathlib import Path

from d3pack.encode import skipped
from d3pack.encode.method import Run
from d3pack.errors import UsageError
from d3pack.teachers import Teacher, TransformersTeacher, teacher_config, teacher_key, train_teacher

_KEY = "teacher key"  # in the journal: which of the cache a run has begun with


def open_teacher(run: Run, typical: int) -> Teacher:
    """Trained here on images of that shorter side, or a `transformers` classifier.

    A run that goes on must have the teacher that it began with: its path says nothing about it.
    """
    teacher = _open(run, typical)
    _recognise(run, "teacher", str(teacher.record["sha256"]))
    if run.options.teacher_map is not None:
        table = Path(run.options.teacher_map).read_bytes()
        _recognise(run, "teacher map", hashlib.sha256(table).hexdigest())
    return teacher


def _recognise(run: Run, name: str, digest: str) -> None:
    if name not in run.journal:
        run.journal.record(name, digest)
    elif run.journal[name] != digest:
        raise UsageError(
            f"the {name} has changed since this work began",
            hint="put it back to go on, or pass --restart to begin anew",
        )


def _open(run: Run, typical: int) -> Teacher:
    options = run.options
    if options.teacher != "train":
        return TransformersTeacher(
            options.teacher, run.source.classes, table=options.teacher_map, device=run.device
        )
    if options.teacher_map is not None:
        raise UsageError("--teacher-map needs a teacher", hint="name one with --teacher")
    lesson = teacher_config(typical, options.teacher_samples, options.seed, run.device)
    journal, key = run.journal, teacher_key(run.source, lesson, run.device)
    if _KEY in journal and (run.cache / f"{journal[_KEY]}.safetensors").exists():
        key = journal[_KEY]  # a run keeps its teacher, also where threads or torch are others now
    teacher = train_teacher(
        run.source, lesson, journal, run.events, cache=run.cache, device=run.device, key=key
    )
    skipped.remember(journal, run.source)
    journal.record(_KEY, key)
    return teacher
