"""The published protocols, pinned figure by figure against the code that they cite."""

from __future__ import annotations

import pytest

from d3pack.errors import UsageError
from d3pack.evaluate import presets
from d3pack.evaluate.augment import (
    DSA,
    ColorJitter,
    CutMix,
    Flip,
    Lighting,
    RandomResizedCrop,
    ShufflePatches,
)
from d3pack.evaluate.presets import SGD, AdamW, Cosine, Exams, Preset, Steps, Updates
from d3pack.evaluate.training import plan


def rates(preset: Preset, total: int) -> list[float]:
    return [preset.optimizer.lr * preset.schedule.factor(i, total) for i in range(total)]


def test_eccv24() -> None:
    preset = presets.ECCV24
    assert (preset.student, preset.norm, preset.size) == ("convnet3", "instance", None)
    assert preset.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert preset.batch_ops == (DSA(("color", "crop", "cutout", "flip", "scale", "rotate")),)
    assert (preset.pixel_ops, preset.mix, preset.labels) == ((), None, "hard")
    assert (preset.seeds, preset.precision) == (3, "float32")
    # range(1000 + 1) epochs; the rate falls after epoch 501 with a fresh optimiser
    lengths = plan(preset, images=1000, classes=100)
    assert (lengths.batch, lengths.units, lengths.per_unit) == (256, 1001, 4)
    found = rates(preset, 1001)
    assert found[501] == pytest.approx(0.01)
    assert found[502] == pytest.approx(0.001)
    assert found[1000] == pytest.approx(0.001)
    assert isinstance(preset.schedule, Steps)
    assert preset.schedule.fresh_momentum
    assert [i for i in range(1001) if preset.exams.due(i, 1001)] == [1000]


def test_dc() -> None:
    preset = presets.DC
    assert preset.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert (preset.batch_ops, preset.pixel_ops, preset.mix) == ((), (), None)
    lengths = plan(preset, images=500, classes=10)
    assert (lengths.batch, lengths.units, lengths.per_unit) == (256, 301, 2)
    assert plan(preset, images=10, classes=10).batch == 10
    found = rates(preset, 301)
    assert (found[151], found[152]) == (pytest.approx(0.01), pytest.approx(0.001))


def test_minimax_hard() -> None:
    preset = presets.MINIMAX_HARD
    assert (preset.student, preset.norm, preset.size) == ("resnetap10", "instance", 224)
    assert preset.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert preset.pixel_ops == (
        RandomResizedCrop(scale=(0.5, 1.0)),
        Flip(0.5),
        ColorJitter(0.4),
        Lighting(0.1),
    )
    assert (preset.mix, preset.labels, preset.normalise) == (CutMix(1.0, 1.0), "hard", "imagenet")
    epochs = {n: preset.units(n) for n in (1, 2, 10, 11, 50, 51, 100, 200, 201, 500, 501)}
    assert epochs == {
        1: 3000, 2: 2000, 10: 2000, 11: 1500, 50: 1500, 51: 1000,
        100: 1000, 200: 1000, 201: 500, 500: 500, 501: 300,
    }  # fmt: skip
    assert plan(preset, images=500, classes=10).batch == 64
    found = rates(preset, 1500)
    assert (found[999], found[1000]) == (pytest.approx(0.01), pytest.approx(0.002))
    assert (found[1249], found[1250]) == (pytest.approx(0.002), pytest.approx(0.0004))
    tested = [i + 1 for i in range(1500) if preset.exams.due(i, 1500)]
    assert tested == list(range(15, 1501, 15))


@pytest.mark.parametrize(
    ("name", "factor", "student", "size"),
    [("rded-soft", 2, "resnet18-imagenet", 224), ("rded-soft-small", 1, "resnet18", None)],
)
def test_rded_soft(name: str, factor: int, student: str, size: int | None) -> None:
    preset = presets.find(name)
    assert (preset.student, preset.norm, preset.size) == (student, "batch", size)
    assert preset.optimizer == AdamW(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    assert preset.pixel_ops == (
        ShufflePatches(factor),
        RandomResizedCrop(scale=(1 / factor, 1.0)),
        Flip(0.5),
    )
    assert (preset.mix, preset.labels, preset.temperature) == (CutMix(1.0, 1.0), "teacher", 20.0)
    assert (preset.normalise, preset.test_resize) == ("imagenet", 8 / 7)
    assert [plan(preset, 10 * n, 10).batch for n in (1, 10, 50)] == [10, 50, 100]
    assert plan(preset, 500, 10).units == 300
    found = rates(preset, 300)
    assert found[0] == pytest.approx(1e-3)
    assert found[150] == pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5))  # cos(pi/4)
    assert found[299] == pytest.approx(0.5e-3, rel=0.02)  # half a cosine: never below a half
    assert [i for i in range(300) if preset.exams.due(i, 300)] == [249, 259, 269, 279, 289, 299]


def test_quick_is_the_same_budget_for_every_set() -> None:
    preset = presets.QUICK
    assert preset.student == "convnet3"
    assert isinstance(preset.length, Updates)
    lengths = {(plan(preset, n, 10).updates, plan(preset, n, 10).batch) for n in (10, 100, 5000)}
    assert lengths == {(preset.length.count, 64)}
    assert isinstance(preset.schedule, Cosine)
    found = rates(preset, preset.length.count)
    assert max(found) <= preset.optimizer.lr * 1.001
    assert found[0] < 0.2 * preset.optimizer.lr
    assert found[-1] < 0.01 * preset.optimizer.lr


def test_a_budget_of_updates_replaces_the_length() -> None:
    """Baselines get the pack's number of steps whatever their own size."""
    preset = presets.ECCV24
    budget = plan(preset, images=1000, classes=10).updates
    small = plan(preset, images=20, classes=10, updates=budget)
    assert budget == 4004
    assert (small.updates, small.batch, small.per_unit, small.units) == (4004, 20, 1, 4004)
    large = plan(preset, images=5000, classes=10, updates=budget)
    assert (large.updates, large.per_unit, large.units) == (4004, 20, 201)


def test_testing_always_ends_with_a_test() -> None:
    exams = Exams(every=7, after=0.5)
    assert [i for i in range(20) if exams.due(i, 20)] == [13, 19]


@pytest.mark.parametrize(
    "exams", [Exams(), Exams(every=7, after=0.5), Exams(parts=4, after=0.4), Exams(parts=100)]
)
@pytest.mark.parametrize("total", [1, 6, 14, 20, 37, 300])
def test_exams_are_counted_as_they_come(exams: Exams, total: int) -> None:
    assert exams.count(total) == sum(exams.due(i, total) for i in range(total))


def test_every_preset_cites_its_source() -> None:
    for name, preset in presets.PRESETS.items():
        assert name.startswith(preset.name)
        assert len(preset.source) > 20


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="minimax-hard"):
        presets.find("best")
