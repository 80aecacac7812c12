"""The teacher of an evaluation: answers in the pack's order, chooses what it finds most real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree, save_classifier
from evaluate_world import BLINK
from torch import Tensor

from d3pack.evaluate import BASELINES, Bench
from d3pack.evaluate import teacher as room
from d3pack.evaluate.baselines import CHOICES, Baseline, chosen_entry
from d3pack.evaluate.entries import Choice
from d3pack.evaluate.teacher import OrderedTeacher, open_teacher
from d3pack.sources import Source, open_source
from d3pack.students.real import RealImages
from d3pack.system import Events, SharedFolder
from d3pack.teachers import Cut, Patches, TeacherConfig, TransformersTeacher
from d3pack.testing import raises_code

WHOLE, RDED = CHOICES
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
    found = teacher.patches(WHOLE, 4)
    assert [tuple(part.shape) for part in found] == [(4, 3, 16, 16)] * 3
    for place, part in zip(real.order, found, strict=True):
        belief = Brightness().logits(part).log_softmax(1)[:, place]
        assert torch.equal(belief.sort(descending=True).values, belief), "best first"
        arrays = [np.asarray(image) for _, image in source.iter_class(place)]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        best = Brightness().logits(images).log_softmax(1)[:, place].topk(4).values
        assert torch.allclose(belief, best, atol=0.05), "and none better was left"
    assert teacher.patches(WHOLE, 4) is found, "asked again, nothing is looked at again"


def test_what_judges_pilots_is_not_chosen(source: Source) -> None:
    real = RealImages(source, ORDER, 16, "training")
    teacher = OrderedTeacher(Brightness(), real)
    held = real.by_class(3, 0)
    for part, judges in zip(teacher.patches(WHOLE, 9, [3, 3, 3]), held, strict=True):
        assert len(part) == 6
        assert not any(torch.equal(image, judge) for image in part for judge in judges)
    assert [len(part) for part in teacher.patches(WHOLE, 9)] == [9, 9, 9]


def test_rded_is_five_crops_and_collages_of_large_images(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[Cut] = []

    def watch(source: Source, c: int, teacher: object, cut: Cut, order: object) -> Patches:
        cuts.append(cut)
        costs = np.arange(12, dtype=np.float32)[::-1].copy()  # the last one is best
        pixels = np.full((12, 3, *cut.size), 0, np.uint8)
        pixels += np.arange(12, dtype=np.uint8)[:, None, None, None]
        return Patches(pixels, costs, 0)

    monkeypatch.setattr(room, "best_patches", watch)
    for size, patch, expected in (
        (32, 32, [[11], [10], [9]]),
        (64, 64, [[11], [10], [9]]),
        (128, 64, [[11, 8, 5, 2], [10, 7, 4, 1], [9, 6, 3, 0]]),
    ):
        teacher = OrderedTeacher(Brightness(), RealImages(source, ORDER, size, "training"))
        found = teacher.patches(RDED, 3)[0]
        half = size // 2
        corners = [[int(i[0, y, x]) for y in (0, half) for x in (0, half)] for i in found]
        assert [c[: len(e)] for c, e in zip(corners, expected, strict=True)] == expected
        cut = cuts[-1]
        assert (cut.size, cut.padded) == ((patch, patch), (size, size))
        assert (cut.crops, cut.scale, cut.as_rded, cut.pool) == (5, (0.08, 1.0), True, 300)


def test_choices_are_baselines_in_the_better_of_two_codecs() -> None:
    for choice in CHOICES:
        baseline = BASELINES[choice.name]
        assert baseline.needs_teacher
        assert [(f.codec, f.layout) for f in baseline.payloads] == [
            ("WebP", "sheet"),
            ("AVIF", "sheet"),
        ]


def test_a_choice_may_be_a_function_and_takes_no_teacher(source: Source, tmp_path: Path) -> None:
    asked: list[tuple[int, list[int]]] = []

    def brightest(real: RealImages, most: int, skip: Sequence[int]) -> list[Tensor]:
        asked.append((most, list(skip)))
        whole = real.by_class(max(real.counts), 0)
        left = [images[n:] for images, n in zip(whole, skip or [0] * len(whole), strict=True)]
        ranks = [images.float().mean((1, 2, 3)).argsort(descending=True) for images in left]
        return [images[rank[:most]] for images, rank in zip(left, ranks, strict=True)]

    choice = Choice("brightest", "the brightest photographs", select=brightest)
    assert not Baseline("brightest", "", lambda *_: None, choice=choice).needs_teacher
    real = RealImages(source, ORDER, 16, "training")
    bench = Bench(real, real, 9, BLINK, tmp_path / "work")
    budget = 400
    entry = chosen_entry(bench, choice, budget)
    assert entry is not None
    assert asked, "pilots learn from what is chosen"
    assert all(min(skip) > 0 for _, skip in asked), "but for what judges them"
    assert entry.key == "brightest-400"
    built = entry.build(0)
    assert asked[-1][1] == []
    assert built.nbytes is not None
    assert 0 < built.nbytes <= budget
    means = [i.float().mean() for i in real.all().images]
    assert built.images.float().mean() > sum(means) / len(means)
    before = len(asked)
    assert chosen_entry(bench, choice, budget) is not None
    assert len(asked) == before, "pilots are kept"
    assert chosen_entry(bench, WHOLE, budget) is None, "there is no teacher"


def test_a_classifier_of_ones_own(source: Source, tmp_path: Path) -> None:
    net = save_classifier(tmp_path / "net", ["lemon", "goldfish", "school bus"])
    real = RealImages(source, ORDER, 16, "training")
    teacher = open_teacher(
        str(net), real, SharedFolder(tmp_path / "w"), torch.device("cpu"), Events()
    )
    assert isinstance(teacher.teacher, TransformersTeacher)
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    by_source = teacher.teacher.logits(images)
    assert torch.equal(teacher.logits(images), by_source[:, [CLASSES.index(n) for n in ORDER]])


def test_a_teacher_trained_for_the_evaluation_is_kept(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    real = RealImages(source, ORDER, 16, "training")
    monkeypatch.setattr(room, "SAMPLES", 300)
    first = open_teacher("train", real, SharedFolder(tmp_path / "w"), torch.device("cpu"), Events())
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    again = open_teacher("train", real, SharedFolder(tmp_path / "w"), torch.device("cpu"), Events())
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
    opened = open_teacher("train", real, SharedFolder(tmp_path), torch.device("meta"), Events())
    assert isinstance(opened.teacher, Brightness)
    assert devices == ["meta"]
    (folder,) = tmp_path.glob("teacher-*")
    (folder / "journal.json").write_text("{", encoding="utf-8")
    with raises_code("E_JOURNAL", match=f"delete {folder} to begin anew"):
        open_teacher("train", real, SharedFolder(tmp_path), torch.device("meta"), Events())
