"""The published protocols, pinned figure by figure against the code that they cite."""

from __future__ import annotations

import pytest

from d3pack.students import protocols
from d3pack.students.protocols import (
    DSA,
    PROTOCOLS,
    SGD,
    AdamW,
    ColorJitter,
    Cosine,
    CutMix,
    Flip,
    Intervals,
    Lighting,
    Protocol,
    RandomResizedCrop,
    ShufflePatches,
    Steps,
    Updates,
)
from d3pack.students.training import lengths


def rates(protocol: Protocol, total: int) -> list[float]:
    return [protocol.optimizer.lr * protocol.schedule.factor(i, total) for i in range(total)]


def test_eccv24() -> None:
    protocol = protocols.ECCV24
    assert (protocol.student, protocol.norm, protocol.size) == ("convnet3", "instance", None)
    assert protocol.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert protocol.batch_ops == (DSA(("color", "crop", "cutout", "flip", "scale", "rotate")),)
    assert (protocol.pixel_ops, protocol.mix, protocol.labels) == ((), None, "hard")
    assert (protocol.seeds, protocol.precision) == (3, "float32")
    # range(1000 + 1) epochs; the rate falls after epoch 501 with a fresh optimiser
    length = lengths(protocol, images=1000, classes=100)
    assert (length.batch, length.units, length.per_unit) == (256, 1001, 4)
    found = rates(protocol, 1001)
    assert found[501] == pytest.approx(0.01)
    assert found[502] == pytest.approx(0.001)
    assert found[1000] == pytest.approx(0.001)
    assert isinstance(protocol.schedule, Steps)
    assert protocol.schedule.fresh_momentum
    assert [i for i in range(1001) if protocol.tests.due(i, 1001)] == [1000]


def test_dc() -> None:
    protocol = protocols.DC
    assert protocol.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert (protocol.batch_ops, protocol.pixel_ops, protocol.mix) == ((), (), None)
    length = lengths(protocol, images=500, classes=10)
    assert (length.batch, length.units, length.per_unit) == (256, 301, 2)
    assert lengths(protocol, images=10, classes=10).batch == 10
    found = rates(protocol, 301)
    assert [found[151], found[152]] == pytest.approx([0.01, 0.001])


def test_minimax_hard_is_the_training_of_its_scripts() -> None:
    protocol = protocols.MINIMAX_HARD
    assert (protocol.student, protocol.norm, protocol.size) == ("resnetap10", "instance", 224)
    assert protocol.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert protocol.pixel_ops == (
        RandomResizedCrop(scale=(0.5, 1.0)),
        Flip(0.5),
        ColorJitter(0.4),
        Lighting(0.1),
    )
    assert (protocol.mix, protocol.labels, protocol.normalise) == (
        CutMix(1.0, 1.0),
        "hard",
        "imagenet",
    )
    epochs = {n: protocol.units(n) for n in (1, 2, 10, 11, 50, 51, 100, 200, 201, 500, 501)}
    assert epochs == {
        1: 3000, 2: 2000, 10: 2000, 11: 1500, 50: 1500, 51: 1000,
        100: 1000, 200: 1000, 201: 500, 500: 500, 501: 300,
    }  # fmt: skip
    assert lengths(protocol, images=500, classes=10).batch == 64
    found = rates(protocol, 1500)
    assert [found[999], found[1000]] == pytest.approx([0.01, 0.002])
    assert [found[1249], found[1250]] == pytest.approx([0.002, 0.0004])
    tested = [i + 1 for i in range(1500) if protocol.tests.due(i, 1500)]
    assert tested == list(range(15, 1501, 15))


def test_dd_ranking() -> None:
    """hard_label.py, its demo's configuration, and the schedule of CIFAR with ConvNet-3."""
    protocol = protocols.DD_RANKING
    assert (protocol.student, protocol.labels, protocol.seeds) == ("convnet3", "hard", 5)
    assert protocol.rates == (0.001, 0.005, 0.01, 0.05, 0.1)
    assert protocol.batch_ops == (DSA(),)
    assert protocol.optimizer == SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    length = lengths(protocol, images=500, classes=10)
    assert (length.batch, length.units, length.per_unit) == (128, 1000, 4)
    found = rates(protocol, 1000)
    assert (found[499], found[500], found[999]) == pytest.approx((0.01, 0.001, 0.001))
    assert [i + 1 for i in range(1000) if protocol.tests.due(i, 1000)] == list(range(10, 1001, 10))
    whole = protocol.whole
    assert whole is not None
    assert (whole.batch_ops, whole.mix, whole.rates) == ((), None, ())
    assert lengths(whole, images=50_000, classes=10).per_unit == 196  # batches of 256
    assert rates(whole, 1000)[::100] == pytest.approx([0.01 * 0.1**k for k in range(10)])
    assert rates(whole, 1000)[99] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "factor", "student", "size"),
    [("rded-soft", 2, "resnet18-imagenet", 224), ("rded-soft-small", 1, "resnet18", None)],
)
def test_rded_soft_is_the_training_of_its_scripts(
    name: str, factor: int, student: str, size: int | None
) -> None:
    protocol = PROTOCOLS[name]
    assert (protocol.student, protocol.norm, protocol.size) == (student, "batch", size)
    assert protocol.optimizer == AdamW(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    assert protocol.pixel_ops == (
        ShufflePatches(factor),
        RandomResizedCrop(scale=(1 / factor, 1.0)),
        Flip(0.5),
    )
    assert (protocol.mix, protocol.labels, protocol.temperature) == (
        CutMix(1.0, 1.0),
        "teacher",
        20.0,
    )
    assert (protocol.normalise, protocol.test_margin, protocol.norm_updates) == (
        "imagenet",
        True,
        2,
    )
    assert [lengths(protocol, 10 * n, 10).batch for n in (1, 10, 50)] == [10, 50, 100]
    assert lengths(protocol, 500, 10).units == 300
    found = rates(protocol, 300)
    assert found[0] == pytest.approx(1e-3)
    assert found[150] == pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5))  # cos(pi/4)
    assert found[299] == pytest.approx(0.5e-3, rel=0.02)  # half a cosine: never below a half
    assert [i for i in range(300) if protocol.tests.due(i, 300)] == [249, 259, 269, 279, 289, 299]


def test_quick_is_the_same_budget_for_every_set() -> None:
    protocol = protocols.QUICK
    assert protocol.student == "convnet3"
    assert isinstance(protocol.length, Updates)
    found_lengths = {
        (lengths(protocol, n, 10).updates, lengths(protocol, n, 10).batch) for n in (10, 100, 5000)
    }
    assert found_lengths == {(protocol.length.count, 64)}
    assert isinstance(protocol.schedule, Cosine)
    found = rates(protocol, protocol.length.count)
    assert max(found) <= protocol.optimizer.lr * 1.001
    assert found[0] < 0.2 * protocol.optimizer.lr
    assert found[-1] < 0.01 * protocol.optimizer.lr


def test_a_budget_of_updates_replaces_the_length() -> None:
    """Baselines get the pack's number of steps whatever their own size."""
    protocol = protocols.ECCV24
    budget = lengths(protocol, images=1000, classes=10).updates
    small = lengths(protocol, images=20, classes=10, updates=budget)
    assert budget == 4004
    assert (small.updates, small.batch, small.per_unit, small.units) == (4004, 20, 1, 4004)
    large = lengths(protocol, images=5000, classes=10, updates=budget)
    assert (large.updates, large.per_unit, large.units) == (4004, 20, 201)


def test_testing_always_ends_with_a_test() -> None:
    intervals = Intervals(every=7, after=0.5)
    assert [i for i in range(20) if intervals.due(i, 20)] == [13, 19]


@pytest.mark.parametrize(
    "intervals",
    [
        Intervals(),
        Intervals(every=7, after=0.5),
        Intervals(parts=4, after=0.4),
        Intervals(parts=100),
    ],
)
@pytest.mark.parametrize("total", [1, 6, 14, 20, 37, 300])
def test_intervals_are_counted_as_they_come(intervals: Intervals, total: int) -> None:
    assert intervals.count(total) == sum(intervals.due(i, total) for i in range(total))


def test_every_protocol_cites_its_source() -> None:
    for name, protocol in PROTOCOLS.items():
        assert name.startswith(protocol.name)
        assert len(protocol.source) > 20


def test_minimax_epochs_batch_and_rate_by_classes() -> None:
    """argument.py: `ipc_epoch` with nclass 100, and what follows `if args.nclass > 100`."""
    protocol = protocols.MINIMAX_HARD
    published = {1: 2000, 10: 1300, 50: 1000, 100: 600, 200: 600, 500: 300, 1000: 200}
    hundred = protocol.settled(100)
    assert {n: hundred.units(n) for n in published} == published
    assert (hundred.batch, hundred.optimizer) == (((protocols.ANY, 64),), SGD(0.01, 0.9, 5e-4))
    for classes, epochs in ((10, 1500), (99, 1500), (100, 1000), (101, 1500), (1000, 1500)):
        assert lengths(protocol, 50 * classes, classes).units == epochs
    for classes in (101, 200, 1000):
        settled = protocol.settled(classes)
        assert settled.optimizer == SGD(lr=0.1, momentum=0.9, weight_decay=1e-4)
        assert lengths(protocol, 50 * classes, classes).batch == 128


@pytest.mark.parametrize(
    ("classes", "batches"),  # at 1, 10 and 50 images a class
    [(10, (10, 50, 100)), (100, (20, 100, 200)), (200, (100, 100, 100)), (1000, (20, 100, 200))],
)
@pytest.mark.parametrize("name", ["rded-soft", "rded-soft-small"])
def test_rded_batch_by_images_and_classes(
    name: str, classes: int, batches: tuple[int, ...]
) -> None:
    """argument.py: doubled for 100 and 1,000 classes, always 100 for Tiny-ImageNet."""
    protocol = PROTOCOLS[name]
    found = tuple(lengths(protocol, n * classes, classes).batch for n in (1, 10, 50))
    assert found == batches


@pytest.mark.parametrize(
    ("student", "rate"),
    [
        ("convnet3", 1e-3), ("convnet4", 1e-3), ("convnet6", 1e-3), ("resnet18", 1e-3),
        ("hf:resnet", 1e-3), ("hf:efficientnet", 2e-3), ("hf:google/efficientnet-b0", 2e-3),
        ("hf:mobilenet_v2", 2.5e-3), ("hf:vit", 1e-4), ("hf:google/vit-base-patch16-224", 1e-4),
        ("hf:swinv2", 1e-4), ("hf:deit", 1e-4), ("vit6", 1e-4),
    ],
)  # fmt: skip
def test_rded_rate_by_student(student: str, rate: float) -> None:
    for name in ("rded-soft", "rded-soft-small"):
        settled = PROTOCOLS[name].settled(10, student=student)
        assert settled.optimizer == AdamW(lr=rate, betas=(0.9, 0.999), weight_decay=0.01)


def test_rded_special_cases() -> None:
    """Sides of conv5 and conv6 on subsets of ImageNet; conv3 on CIFAR-100."""
    large, small = PROTOCOLS["rded-soft"], PROTOCOLS["rded-soft-small"]
    for student, classes, side in (
        ("convnet5", 10, 128), ("convnet6", 100, 128), ("convnet5", 1000, 224),
        ("resnet18-imagenet", 10, 224), ("convnet4", 10, 224),
    ):  # fmt: skip
        assert large.settled(classes, student=student).size == side
    special = small.settled(100, student="convnet3", size=32)
    assert (special.batch, special.optimizer) == (((protocols.ANY, 25),), AdamW(lr=2e-3))
    for student, classes, size in (
        ("convnet3", 10, 32),
        ("convnet3", 100, 64),
        ("resnet18", 100, 32),
    ):
        assert small.settled(classes, student=student, size=size).optimizer == AdamW(lr=1e-3)


@pytest.mark.parametrize(
    ("size", "side"), [(32, 32), (64, 72), (128, 144), (224, 256), (33, 33), (8, 8), (28, 32)]
)
def test_rded_resizes_tests_to_eight_sevenths_in_whole_sevenths(size: int, side: int) -> None:
    """validation/main.py: Resize(input_size // 7 * 8), CenterCrop(input_size)."""
    assert PROTOCOLS["rded-soft"].test_side(size) == side
    assert protocols.MINIMAX_HARD.test_side(size) == size


def test_published_protocols_resize_bilinearly() -> None:
    found = {name: protocol.resample for name, protocol in PROTOCOLS.items()}
    assert (found.pop("quick"), found.pop("standard")) == ("bicubic", "bicubic")
    assert set(found.values()) == {"bilinear"}


def test_settled_protocol_is_not_changed_again() -> None:
    for protocol in PROTOCOLS.values():
        once = protocol.settled(100, student="hf:vit", size=64)
        assert once.rules == ()
        assert once.settled(1000, size=32) == once
