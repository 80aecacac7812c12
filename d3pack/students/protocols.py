"""Protocols: how students are trained and tested. `quick` and `standard` are ours.

The others are published; each names its source.

A protocol is a value; `augment.py` and `training.py` do what it says. To add one, add it here: the
settings, the command line and the documentation take their choices from `PROTOCOLS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

Norm = Literal["instance", "batch"]
Labels = Literal["hard", "stored", "teacher"]
Resample = Literal["bilinear", "bicubic"]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]  # of each channel, in 0..1
ByImages = tuple[tuple[int, int], ...]  # (images per class up to, value), ascending
ANY = 1 << 60  # images per class: the last row of such a table


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirror left-right with probability p."""

    p: float = 0.5


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A random window resized to the full size, drawn as torchvision does."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    tries: int = 10


@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Brightness, contrast and saturation each moved by up to `strength`, in random order."""

    strength: float = 0.4


@dataclass(frozen=True, slots=True)
class Lighting:
    """AlexNet's noise along the principal colour axes of ImageNet."""

    std: float = 0.1


@dataclass(frozen=True, slots=True)
class ShufflePatches:
    """Cut into factor x factor tiles, shuffle columns and rows of tiles (RDED)."""

    factor: int


@dataclass(frozen=True, slots=True)
class DSA:
    """Differentiable siamese augmentation (arXiv 2102.08259): one operation a batch, drawn anew."""

    strategy: tuple[str, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")


@dataclass(frozen=True, slots=True)
class CutMix:
    """Paste one rectangle of a shuffled batch over the batch, and mix labels (arXiv 1905.04899)."""

    p: float = 1.0
    beta: float = 1.0


PILOT_SHARE = 4  # pilots, short trainings that choose something, have a quarter of the updates
HELD_BACK = 100  # training images of each class, at most, that only judge pilots


def held_back(count: int) -> int:
    """Return how many images of a class judge pilots: a fifth at most, and never the last."""
    return min(HELD_BACK, max(1, count // 5), count - 1)


BatchOp = Flip | RandomResizedCrop | ColorJitter | Lighting | ShufflePatches | DSA


@dataclass(frozen=True, slots=True)
class Updates:
    """A fixed number of optimiser steps, whatever the size of the set."""

    count: int


@dataclass(frozen=True, slots=True)
class Epochs:
    """Passes over the set, by images per class: the first row that is large enough counts."""

    table: ByImages


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW; parameters of one dimension have no weight decay."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


@dataclass(frozen=True, slots=True)
class Steps:
    """Multiply the rate by `gamma` at each milestone, total * a // b + shift."""

    milestones: tuple[tuple[int, int], ...]
    gamma: float
    shift: int = 0
    fresh_momentum: bool = False  # the published loop makes a new optimiser at the milestone

    def passed(self, position: int, total: int) -> int:
        """Return how many milestones lie behind a position."""
        return sum(position >= total * a // b + self.shift for a, b in self.milestones)

    def factor(self, position: int, total: int) -> float:
        """Return the share of the full rate at a position."""
        return float(self.gamma ** self.passed(position, total))


@dataclass(frozen=True, slots=True)
class Cosine:
    """0.5 (1 + cos(pi p / stretch)) with p from 0 to 1, after a linear warm-up."""

    stretch: float = 1.0
    warmup: float = 0.0

    def factor(self, position: int, total: int) -> float:
        """Return the share of the full rate at a position."""
        if position < self.warmup * total:
            return (position + 1) / (self.warmup * total + 1)
        return 0.5 * (1.0 + math.cos(math.pi * position / total / self.stretch))


@dataclass(frozen=True, slots=True)
class Intervals:
    """When to test: every so many units (or total // parts) after a share of them, and at the end.

    Units are epochs, or updates where the protocol counts those.
    """

    every: int = 0
    parts: int = 1
    after: float = 0.0

    def due(self, position: int, total: int) -> bool:
        """Return whether to test when unit `position` (from 0) of `total` has ended."""
        every = self.every or max(1, total // self.parts)
        regular = (position + 1) % every == 0 and position >= self.after * total
        return regular or position == total - 1

    def count(self, total: int) -> int:
        """Return the number of tests."""
        every = self.every or max(1, total // self.parts)
        skipped = math.ceil(self.after * total) // every
        return max((total - 1) // every - skipped, 0) + 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a protocol changes for some students, numbers of classes and sides of images."""

    changes: tuple[tuple[str, Any], ...]  # fields of the protocol and their values
    students: tuple[str, ...] = ("*",)  # patterns, as of file names
    classes: tuple[int, int] = (1, ANY)  # first and last number of classes
    size: int | None = None

    def covers(self, student: str, classes: int, size: int | None) -> bool:
        """Return whether the rule is for such a case."""
        return (
            any(fnmatchcase(student, pattern) for pattern in self.students)
            and self.classes[0] <= classes <= self.classes[1]
            and self.size in (None, size)
        )


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to train and test a student, complete once `settled`."""

    name: str
    source: str
    student: str
    norm: Norm
    size: int | None  # pixels; None: the size of the test images
    batch: ByImages
    length: Updates | Epochs
    optimizer: SGD | AdamW
    schedule: Steps | Cosine
    tests: Intervals
    pixel_ops: tuple[BatchOp, ...] = ()  # on values in 0..1
    batch_ops: tuple[BatchOp, ...] = ()  # on normalised values
    mix: CutMix | None = None
    labels: Labels = "hard"
    temperature: float = 1.0
    normalise: Literal["data", "imagenet"] | MeanStd = "data"  # data: the real training images
    test_margin: bool = False  # test images are larger before the centre crop, by `test_side`
    resample: Resample = "bilinear"  # where real images are resized
    norm_updates: int = 1  # of the running statistics of batch norm, in every step
    precision: Literal["float32", "bfloat16"] = "float32"
    seeds: int = 3
    rates: tuple[float, ...] = ()  # students of each seed; the one with the best test counts
    whole: Protocol | None = None  # how students of all real images are trained, if otherwise
    rules: tuple[Rule, ...] = ()

    def settled(
        self, classes: int, *, student: str | None = None, size: int | None = None
    ) -> Protocol:
        """Return the protocol for a student, a number of classes and a side, without rules."""
        student, size = student or self.student, self.size or size
        changes: dict[str, Any] = {"student": student, "size": size, "rules": ()}
        for rule in self.rules:
            if rule.covers(student, classes, size):
                changes |= dict(rule.changes)
        return replace(self, **changes)

    def test_side(self, size: int) -> int:
        """Return the shorter side of test images before their centre is cropped to `size`."""
        return max(size, size // 7 * 8) if self.test_margin else size

    def units(self, images_per_class: int) -> int:
        """Return the number of epochs, or of updates where the protocol counts those."""
        if isinstance(self.length, Updates):
            return self.length.count
        return by_images(self.length.table, images_per_class)


def by_images(table: ByImages, images_per_class: int) -> int:
    """Return the value of the first row that covers this many images per class."""
    return next((value for limit, value in table if images_per_class <= limit), table[-1][1])


# What `quick` gives up for its speed: it has 300 steps where the literature takes thousands, so
# students of large sets are undertrained (of all entries alike), bfloat16 products where they are
# fast, and AdamW because it gets furthest in few steps. Chosen on ten random real images of each
# class of CIFAR-10, never on a pack; `benchmarks/quick.py --choose` compares its neighbours on
# training images.
QUICK = Protocol(
    name="quick",
    source="d3pack's own: made for two processor cores",
    student="convnet3",
    norm="instance",
    size=None,
    batch=((ANY, 64),),
    length=Updates(300),
    optimizer=AdamW(lr=1e-3),
    schedule=Cosine(warmup=0.05),
    tests=Intervals(parts=3, after=0.5),
    batch_ops=(DSA(),),
    labels="stored",
    resample="bicubic",
    precision="bfloat16",
)

# `quick` hides what more bytes buy: even the whole of CIFAR-10 reaches 57 % in 300 updates
STANDARD = replace(
    QUICK,
    name="standard",
    source="d3pack's own: as quick, but long enough to tell large payloads apart",
    length=Updates(1500),
)

DC = Protocol(
    name="dc",
    source="VICO-UoE/DatasetCondensation utils.evaluate_synset, main.py without --dsa: the"
    " protocol behind the published accuracies of random real images",
    student="convnet3",
    norm="instance",
    size=None,
    batch=((ANY, 256),),
    length=Epochs(((ANY, 301),)),
    optimizer=SGD(),
    schedule=Steps(milestones=((1, 2),), gamma=0.1, shift=2, fresh_momentum=True),
    tests=Intervals(),
)

ECCV24 = Protocol(
    name="eccv24",
    source="DataDistillation/ECCV2024-Dataset-Distillation-Challenge evaluate.py (track 1)",
    student="convnet3",
    norm="instance",
    size=None,
    batch=((ANY, 256),),
    length=Epochs(((ANY, 1001),)),
    optimizer=SGD(),
    schedule=Steps(milestones=((1, 2),), gamma=0.1, shift=2, fresh_momentum=True),
    tests=Intervals(),
    batch_ops=(DSA(),),
)

# With 100 classes two thirds of the epochs, rounded down to hundreds; with more, as for ten.
_MINIMAX_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (ANY, 300))
_MINIMAX_100 = tuple((most, epochs * 2 // 3 // 100 * 100) for most, epochs in _MINIMAX_EPOCHS)

MINIMAX_HARD = Protocol(
    name="minimax-hard",
    source="vimar-gu/MinimaxDiffusion train.py, argument.py, data.py (arXiv 2311.15529)",
    student="resnetap10",
    norm="instance",
    size=224,
    batch=((ANY, 64),),
    length=Epochs(_MINIMAX_EPOCHS),
    optimizer=SGD(),
    schedule=Steps(milestones=((2, 3), (5, 6)), gamma=0.2),
    tests=Intervals(parts=100),
    pixel_ops=(RandomResizedCrop(scale=(0.5, 1.0)), Flip(), ColorJitter(0.4), Lighting(0.1)),
    mix=CutMix(p=1.0, beta=1.0),
    normalise="imagenet",
    rules=(
        Rule((("length", Epochs(_MINIMAX_100)),), classes=(100, 100)),
        Rule(
            (("optimizer", SGD(lr=0.1, weight_decay=1e-4)), ("batch", ((ANY, 128),))),
            classes=(101, ANY),
        ),
    ),
)


def _transformers(*names: str) -> tuple[str, ...]:
    """Patterns of students that are a config of transformers, with or without an owner."""
    return tuple(f"hf:{owner}{name}*" for name in names for owner in ("", "*/"))


# RDED names batches for 10, 100 and 1,000 classes, and for Tiny-ImageNet's 200; between them, the
# next smaller number counts. Its rates are by student: all that are not here train at 1e-3.
_RDED_BATCH = ((9, 10), (49, 50), (ANY, 100))
_RDED_TWICE = tuple((most, 2 * batch) for most, batch in _RDED_BATCH)
_RDED_RULES = (
    Rule((("batch", _RDED_TWICE),), classes=(100, 199)),
    Rule((("batch", ((ANY, 100),)),), classes=(200, 999)),
    Rule((("batch", _RDED_TWICE),), classes=(1000, ANY)),
    Rule(
        (("optimizer", AdamW(lr=1e-4)),), students=("vit*", *_transformers("vit", "deit", "swin"))
    ),
    Rule((("optimizer", AdamW(lr=2e-3)),), students=_transformers("efficientnet")),
    Rule(
        (("optimizer", AdamW(lr=2.5e-3)),),
        students=_transformers("mobilenet_v2", "mobilenet-v2"),
    ),
)
# conv5 and conv6 on ImageNet's subsets work at 128 px; conv3 on CIFAR-100 is "special".
_RDED_LARGE = Rule((("size", 128),), students=("convnet5", "convnet6"), classes=(1, 100))
_RDED_CIFAR100 = Rule(
    (("batch", ((ANY, 25),)), ("optimizer", AdamW(lr=2e-3))),
    students=("convnet3",),
    classes=(100, 100),
    size=32,
)


# ConvNet-3 on CIFAR, for which DD-Ranking has a schedule of the whole real set: rates fall every
# hundred epochs there. Ours: mean and deviation of channels come from the training images at hand.
DD_RANKING = Protocol(
    name="dd-ranking",
    source="NUS-HPC-AI-Lab/DD-Ranking metrics/hard_label.py, utils/train_and_eval.py,"
    " configs/Demo_LRS_Hard_Label.yaml (arXiv 2505.13300)",
    student="convnet3",
    norm="instance",
    size=None,
    batch=((ANY, 128),),
    length=Epochs(((ANY, 1000),)),
    optimizer=SGD(),
    schedule=Steps(milestones=((1, 2),), gamma=0.1),
    tests=Intervals(every=10),
    batch_ops=(DSA(),),
    seeds=5,
    rates=(0.001, 0.005, 0.01, 0.05, 0.1),
    whole=Protocol(
        name="dd-ranking, the whole real set",
        source="REAL_DATA_TRAINING_CONFIG of CIFAR10-ConvNet-3 and CIFAR100-ConvNet-3",
        student="convnet3",
        norm="instance",
        size=None,
        batch=((ANY, 256),),
        length=Epochs(((ANY, 1000),)),
        optimizer=SGD(),
        schedule=Steps(milestones=tuple((tenth, 10) for tenth in range(1, 10)), gamma=0.1),
        tests=Intervals(every=10),
    ),
)
RANKED = ((10, 32), (100, 32))  # (classes, side) of the sets that it has this schedule for


def rded_soft(name: str, factor: int, student: str, size: int | None, rule: Rule) -> Protocol:
    """Return RDED's validation: `factor` 2 for ImageNet-like sets, 1 for CIFAR, Tiny-ImageNet."""
    return Protocol(
        name=name,
        source="LINs-lab/RDED validation/main.py, argument.py (arXiv 2312.03526)",
        student=student,
        norm="batch",
        size=size,
        batch=_RDED_BATCH,
        length=Epochs(((ANY, 300),)),
        optimizer=AdamW(),
        schedule=Cosine(stretch=2.0),
        tests=Intervals(every=10, after=0.8),
        pixel_ops=(ShufflePatches(factor), RandomResizedCrop(scale=(1 / factor, 1.0)), Flip()),
        mix=CutMix(p=1.0, beta=1.0),
        labels="teacher",
        temperature=20.0,
        normalise="imagenet",
        test_margin=True,
        norm_updates=2,  # the published loop also passes every batch through without a gradient
        rules=(*_RDED_RULES, rule),
    )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        QUICK,
        STANDARD,
        DC,
        ECCV24,
        MINIMAX_HARD,
        DD_RANKING,
        rded_soft("rded-soft", 2, "resnet18-imagenet", 224, _RDED_LARGE),
        rded_soft("rded-soft-small", 1, "resnet18", None, _RDED_CIFAR100),
    )
}
