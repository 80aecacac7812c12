"""The teacher of an evaluation: answers in the pack's order, chooses what it finds most real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree, save_classifier
from torch import Tensor

from d3pack.encode import EncodeSettings
from d3pack.evaluate import teacher as room
from d3pack.evaluate.real import RealImages
from d3pack.evaluate.teacher import OrderedTeacher, open_teacher
from d3pack.sources import Source, open_source
from d3pack.system import Events
from d3pack.teachers import TeacherConfig, TransformersTeacher
from d3pack.testing import raises_code

ORDER = ("school bus", "goldfish", "lemon")  # of the pack; the source has its own


class Brightness:
    """A teacher one can compute by hand: class c of the source likes its own colour channel."""

    classes = CLASSES
    record: ClassVar[dict[str, object]] = {"sha256": "ab" * 32}

    def logits(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 25

    def features(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(make_tree(tmp_path / "real", 9))


def test_logits_come_in_the_packs_order(source: Source) -> None:
    teacher = OrderedTeacher(Brightness(), RealImages(source, ORDER, 16, "training"))
    images = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    expected = Brightness().logits(images)[:, [CLASSES.index(name) for name in ORDER]]
    assert torch.equal(teacher.logits(images), expected)
    assert teacher.identity == "ab" * 32


def test_patches_are_the_images_the_teacher_believes_most(source: Source) -> None:
    real = RealImages(source, ORDER, 16, "training")
    teacher = OrderedTeacher(Brightness(), real)
    found = teacher.patches(4)
    assert [tuple(part.shape) for part in found] == [(4, 3, 16, 16)] * 3
    for place, part in zip(real.order, found, strict=True):
        belief = Brightness().logits(part).log_softmax(1)[:, place]
        assert torch.equal(belief.sort(descending=True).values, belief), "best first"
        arrays = [np.asarray(image) for _, image in source.iter_class(place)]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        best = Brightness().logits(images).log_softmax(1)[:, place].topk(4).values
        assert torch.allclose(belief, best, atol=0.05), "and none better was left"
    assert teacher.patches(4) is found, "asked again, nothing is looked at again"


def test_a_classifier_of_ones_own(source: Source, tmp_path: Path) -> None:
    net = save_classifier(tmp_path / "net", ["lemon", "goldfish", "school bus"])
    real = RealImages(source, ORDER, 16, "training")
    teacher = open_teacher(str(net), real, tmp_path / "w", torch.device("cpu"), Events())
    assert isinstance(teacher.teacher, TransformersTeacher)
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    by_source = teacher.teacher.logits(images)
    assert torch.equal(teacher.logits(images), by_source[:, [CLASSES.index(n) for n in ORDER]])


def test_a_teacher_trained_for_the_evaluation_is_kept(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    real = RealImages(source, ORDER, 16, "training")
    short = replace(EncodeSettings(), teacher_samples=300)
    monkeypatch.setattr(room, "EncodeSettings", lambda: short)
    first = open_teacher("train", real, tmp_path / "w", torch.device("cpu"), Events())
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    again = open_teacher("train", real, tmp_path / "w", torch.device("cpu"), Events())
    assert torch.equal(first.logits(images), again.logits(images))
    assert first.identity == again.identity


def test_teacher_is_configured_for_its_device_and_a_bad_journal_says_what_to_delete(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def configure(typical: int, samples: int, seed: int, device: str = "cpu") -> TeacherConfig:
        devices.append(device)
        return TeacherConfig(typical, samples, seed=seed)

    monkeypatch.setattr(room, "teacher_config", configure)
    monkeypatch.setattr(room, "train_teacher", lambda *_, **__: Brightness())
    real = RealImages(source, ORDER, 16, "training")
    opened = open_teacher("train", real, tmp_path, torch.device("meta"), Events())
    assert isinstance(opened.teacher, Brightness)
    assert devices == ["meta"]
    (folder,) = tmp_path.glob("teacher-*")
    (folder / "journal.json").write_text("{", encoding="utf-8")
    with raises_code("E_JOURNAL", match=f"delete {folder} to begin anew"):
        open_teacher("train", real, tmp_path, torch.device("meta"), Events())
