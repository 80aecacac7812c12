"""Classifiers that choose images and label them: a given one, or one that is trained here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system.lazy import lazy_names

if TYPE_CHECKING:
    from d3pack.teachers.patches import Cut, Patches, best_patches
    from d3pack.teachers.resnet import (
        SmallResNet,
        lesson_for,
        teacher_directory,
        teacher_key,
        train_teacher,
    )
    from d3pack.teachers.teacher import Teacher, TransformersTeacher, batched

__all__ = [
    "Cut",
    "Patches",
    "SmallResNet",
    "Teacher",
    "TransformersTeacher",
    "batched",
    "best_patches",
    "lesson_for",
    "teacher_directory",
    "teacher_key",
    "train_teacher",
]

__getattr__ = lazy_names(
    __name__,
    {
        "patches": ["Cut", "Patches", "best_patches"],
        "resnet": [
            "SmallResNet",
            "lesson_for",
            "teacher_directory",
            "teacher_key",
            "train_teacher",
        ],
        "teacher": ["Teacher", "TransformersTeacher", "batched"],
    },
)
