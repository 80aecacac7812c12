"""Teachers: classifiers that choose images and answer with soft labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.teachers.resnet import (
        SmallResNet,
        TeacherConfig,
        TrainedTeacher,
        teacher_cache,
        teacher_config,
        teacher_key,
        train_teacher,
    )
    from d3pack.teachers.teacher import (
        Teacher,
        TeacherError,
        TransformersTeacher,
        batched,
        fit,
        match_labels,
    )

__all__ = [
    "SmallResNet",
    "Teacher",
    "TeacherConfig",
    "TeacherError",
    "TrainedTeacher",
    "TransformersTeacher",
    "batched",
    "fit",
    "match_labels",
    "teacher_cache",
    "teacher_config",
    "teacher_key",
    "train_teacher",
]

__getattr__ = lazy_names(
    __name__,
    {
        "resnet": [
            "SmallResNet",
            "TeacherConfig",
            "TrainedTeacher",
            "teacher_cache",
            "teacher_config",
            "teacher_key",
            "train_teacher",
        ],
        "teacher": [
            "Teacher",
            "TeacherError",
            "TransformersTeacher",
            "batched",
            "fit",
            "match_labels",
        ],
    },
)
