"""One student: trained from scratch on images in memory, tested on real ones."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d3pack.decode import reproducible_cuda
from d3pack.errors import UsageError
from d3pack.students.augment import apply_all, cutmix
from d3pack.students.images import LabelledImages
from d3pack.students.networks import build_student
from d3pack.students.protocols import (
    AdamW,
    Intervals,
    Labels,
    MeanStd,
    Protocol,
    Resample,
    Steps,
    Updates,
    by_images,
)
from d3pack.system import mixed_precision, resolve_device, writing

IMAGENET: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CPU_CHUNK = 16  # so few images that a layer's activations stay in the processor's cache
_TEST_CHUNK = 64
_PROBE = 8  # images of the batch that tells how long a student takes
_SAVE_EVERY = 60.0  # seconds: what a stopped run loses at most

Teach = Callable[[Tensor], Tensor]  # uint8 images -> logits
Progress = Callable[[int, int], None]  # updates done, updates in all


@dataclass(frozen=True, slots=True)
class History:
    """How one student was trained, and its accuracy."""

    protocol: str
    student: str
    seed: int
    images: int
    updates: int
    batch: int
    rate: float  # the highest of the schedule
    last: float  # accuracy on the test images, 0..1
    best: float
    curve: tuple[tuple[int, float], ...]  # (updates done, accuracy)
    confusion: tuple[tuple[int, ...], ...]  # rows: truth, columns: answer, at the end
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> History:
        """Return the history that `to_json` gave."""
        curve = tuple((int(step), float(accuracy)) for step, accuracy in data["curve"])
        confusion = tuple(tuple(int(n) for n in row) for row in data["confusion"])
        return cls(**{**data, "curve": curve, "confusion": confusion})


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a protocol trains on one set of images."""

    batch: int
    updates: int
    units: int  # what schedule and tests count: epochs, or updates
    per_unit: int  # updates in a unit

    def unit(self, update: int) -> int:
        """Return the unit that an update belongs to."""
        return min(update // self.per_unit, self.units - 1)


def lengths(protocol: Protocol, images: int, classes: int, updates: int | None = None) -> Lengths:
    """Return the lengths for so many images in all.

    `updates` takes the place of the protocol's own number of steps: baselines get the pack's.
    """
    protocol = protocol.settled(classes)
    per_class = max(1, images // classes)
    batch = by_images(protocol.batch, per_class)
    if isinstance(protocol.length, Updates):
        count = updates or protocol.length.count
        return Lengths(batch, count, count, 1)
    batch = min(batch, images)
    per_epoch = math.ceil(images / batch)
    total = updates or protocol.units(per_class) * per_epoch
    return Lengths(batch, total, math.ceil(total / per_epoch), per_epoch)


def _rng(seed: int, stream: int, position: int) -> torch.Generator:
    """A generator for one place in the run: a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed(((seed << 2 | stream) << 40 | position) % (1 << 63))


def _indices(length: Lengths, images: int, seed: int, start: int) -> Iterator[Tensor]:
    """The images of each update: epochs are cut into batches, or run on from one to the next."""
    if length.per_unit == 1 and length.updates == length.units:
        stream, epoch = torch.empty(0, dtype=torch.long), start * length.batch // images
        skip = start * length.batch - epoch * images
        for _ in range(start, length.updates):
            while len(stream) < length.batch + skip:
                stream = torch.cat([stream, torch.randperm(images, generator=_rng(seed, 0, epoch))])
                epoch += 1
            stream, skip = stream[skip:], 0
            yield stream[: length.batch]
            stream = stream[length.batch :]
        return
    for update in range(start, length.updates):
        epoch, place = divmod(update, length.per_unit)
        order = torch.randperm(images, generator=_rng(seed, 0, epoch))
        yield order[place * length.batch : (place + 1) * length.batch]


def statistics(images: Tensor) -> MeanStd:
    """Return mean and standard deviation of each channel of uint8 images, in 0..1."""
    values = images.to(torch.float64) / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def fit(
    images: Tensor, size: int, *, side: int | None = None, resample: Resample = "bicubic"
) -> Tensor:
    """Return uint8 images as (N, 3, size, size): shorter side resized, then the centre cropped.

    `side` is what the shorter side becomes; None: the size.
    """
    height, width = images.shape[2:]
    side = side or size
    if (height, width) != (side, side):
        scale = side / min(height, width)
        shape = [max(side, round(height * scale)), max(side, round(width * scale))]
        parts = [
            F.interpolate(part.float(), shape, mode=resample, antialias=True, align_corners=False)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            for part in torch.split(images, 1024)
        ]
        images = torch.cat(parts) if parts else images.new_empty((0, 3, *shape))
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size].contiguous()


def _optimizer(protocol: Protocol, model: nn.Module) -> torch.optim.Optimizer:
    choice = protocol.optimizer
    if isinstance(choice, AdamW):
        decayed = [p for p in model.parameters() if p.ndim > 1]
        spared = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": spared, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=choice.lr, betas=choice.betas, weight_decay=choice.weight_decay
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=choice.lr,
        momentum=choice.momentum,
        weight_decay=choice.weight_decay,
        nesterov=choice.nesterov,
    )


def _update_norms_often(model: nn.Module, times: int) -> None:
    """Let running statistics move in one forward as far as in so many with the same batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** times


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def train_student(
    train: LabelledImages,
    test: LabelledImages,
    protocol: Protocol,
    seed: int,
    *,
    classes: int | None = None,
    updates: int | None = None,
    teacher: Teach | None = None,
    device: str | torch.device | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> History:
    """Train a fresh student, and test it.

    The same seed, machine and number of threads give the same student: CUDA's settings are fixed
    as for exact images, whatever the program around has set.

    Args:
        train: images of any one size.
        test: real images; square, where the protocol has no size of its own.
        protocol: how to train and test.
        seed: decides the first weights, the order and the augmentations.
        classes: number of classes; None: as many as the training labels show.
        updates: number of steps in place of the protocol's own.
        teacher: labels what the student sees, where the protocol asks for that.
        device: where to train; None: CUDA where there is one.
        checkpoint: file from which a stopped run goes on.
        progress: called after every update.

    Raises:
        UsageError: if there are no images, or the protocol cannot be followed with them.
    """
    _check(train, test, protocol, teacher)
    if classes is None:
        classes = int(train.labels.max()) + 1 if train.soft is None else train.soft.shape[1]
    size = protocol.size or min(test.images.shape[2:])
    protocol = protocol.settled(classes, size=size)
    run = _Run(train, test, protocol, seed, classes, updates, teacher, resolve_device(device))
    if checkpoint is not None and checkpoint.exists():
        run.done, run.curve, run.seconds = load_checkpoint(checkpoint, run.model, run.optimizer)
    began = saved = time.monotonic()
    before = run.seconds
    with reproducible_cuda():
        for chosen in _indices(run.lengths, len(train.images), seed, run.done):
            run.update(chosen)
            if progress is not None:
                progress(run.done, run.lengths.updates)
            now = time.monotonic()
            late = now - saved > _SAVE_EVERY and run.done < run.lengths.updates
            if checkpoint is not None and late:
                saved = now
                seconds = before + saved - began
                save_checkpoint(checkpoint, run.model, run.optimizer, run.done, run.curve, seconds)
    run.seconds = before + time.monotonic() - began
    return run.history()


def _check(
    train: LabelledImages, test: LabelledImages, protocol: Protocol, teacher: Teach | None
) -> None:
    if len(train.images) == 0 or len(test.images) == 0:
        which = "training" if len(train.images) == 0 else "test"
        raise UsageError(f"no {which} images", hint="check the folders and the class names")
    height, width = test.images.shape[2:]
    if protocol.size is None and height != width:
        raise UsageError(
            f"invalid test images of {width}x{height} px: protocol {protocol.name} needs square"
            " ones",
            hint="give a size",
        )
    if protocol.labels == "teacher" and teacher is None:
        raise UsageError(
            f"protocol {protocol.name} needs a teacher, which labels every augmented image",
            hint="give a teacher, or choose a protocol with stored or hard labels",
        )


class _Run:
    """A student in training: its images, its weights, and how far it has come."""

    def __init__(
        self,
        train: LabelledImages,
        test: LabelledImages,
        protocol: Protocol,
        seed: int,
        classes: int,
        updates: int | None,
        teacher: Teach | None,
        device: torch.device,
    ) -> None:
        assert protocol.size is not None  # `train_student` has settled it
        size, resample = protocol.size, protocol.resample
        self.protocol, self.seed, self.classes, self.teacher = protocol, seed, classes, teacher
        self.images = fit(train.images, size, resample=resample).to(device)
        self.targets = _targets(train, classes, protocol.labels).to(device)
        self.weighted = train.weights is not None
        side = protocol.test_side(size)
        self.test_images = fit(test.images, size, side=side, resample=resample)
        self.test_labels = test.labels
        mean, std = self._mean_std()
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]
        student = build_student(protocol.student, classes, size, norm=protocol.norm, seed=seed)
        self.model = student.to(device).train()
        _update_norms_often(self.model, protocol.norm_updates)
        self.optimizer = _optimizer(protocol, self.model)
        self.lengths = lengths(protocol, len(train.images), classes, updates)
        undivided = device.type != "cpu" or _has_batch_norm(self.model)
        self.chunk = self.lengths.batch if undivided else _CPU_CHUNK
        self.precise = protocol.precision != "bfloat16"
        self.done, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self.confusion = torch.zeros(classes, classes, dtype=torch.long)

    def _mean_std(self) -> MeanStd:
        if self.protocol.normalise == "imagenet":
            return IMAGENET
        return statistics(self.images) if self.protocol.normalise == "data" else (
            self.protocol.normalise
        )  # fmt: skip

    def update(self, chosen: Tensor) -> None:
        """Take one step on the chosen images, and test where it is time."""
        rng, unit = _rng(self.seed, 1, self.done), self.lengths.unit(self.done)
        self._set_rate(unit)
        x, targets = self._batch(chosen.to(self.images.device), rng)
        self.optimizer.zero_grad()
        self._backward(x, targets)
        self.optimizer.step()
        self.done += 1
        ends_unit = self.done % self.lengths.per_unit == 0 or self.done == self.lengths.updates
        if ends_unit and self.protocol.tests.due(unit, self.lengths.units):
            self.confusion = self._test()
            self.curve.append((self.done, float(self.confusion.trace() / self.confusion.sum())))

    def _set_rate(self, unit: int) -> None:
        schedule, total = self.protocol.schedule, self.lengths.units
        if isinstance(schedule, Steps) and schedule.fresh_momentum:
            before = schedule.passed(self.lengths.unit(max(self.done - 1, 0)), total)
            if schedule.passed(unit, total) != before:
                self.optimizer = _optimizer(self.protocol, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = self.protocol.optimizer.lr * schedule.factor(unit, total)

    def _batch(self, chosen: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images, and the labels that the student is to give them."""
        protocol, targets = self.protocol, self.targets[chosen]
        x = apply_all(protocol.pixel_ops, self.images[chosen].float() / 255, rng)
        x = apply_all(protocol.batch_ops, (x - self.mean) / self.std, rng)
        if protocol.mix is not None:
            x, targets = cutmix(protocol.mix, x, targets, rng)
        if protocol.labels == "teacher" and self.teacher is not None:
            pixels = ((x * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
            with torch.no_grad():
                logits = self.teacher(pixels).to(x.device)
                answers = F.softmax(logits.float() / protocol.temperature, 1)
            targets = answers * targets.sum(1, keepdim=True) if self.weighted else answers
        return x, targets

    def _backward(self, x: Tensor, targets: Tensor) -> None:
        """Gradients of the mean loss of a batch, in chunks (exact: nothing couples the images)."""
        temperature = self.protocol.temperature
        parts = zip(torch.split(x, self.chunk), torch.split(targets, self.chunk), strict=True)
        for part, target in parts:
            logits = self._logits(part).float()
            if self.protocol.labels == "teacher":
                loss = F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="sum")
            else:
                loss = F.cross_entropy(logits, target, reduction="sum")
            (loss / len(x)).backward()

    def _logits(self, x: Tensor) -> Tensor:
        with mixed_precision(x.device, not self.precise):
            logits: Tensor = self.model(x)
            return logits

    @torch.no_grad()
    def _test(self) -> Tensor:
        """The confusion matrix (truth, answer)."""
        self.model.eval()
        answers = []
        for part in torch.split(self.test_images, _TEST_CHUNK):
            x = (part.to(self.mean.device).float() / 255 - self.mean) / self.std
            answers.append(self._logits(x).argmax(1).cpu())
        self.model.train()
        flat = self.test_labels.cpu() * self.classes + torch.cat(answers)
        matrix = torch.bincount(flat, minlength=self.classes**2)
        return matrix.view(self.classes, self.classes)

    def history(self) -> History:
        """What there is to say when all updates are done."""
        return History(
            protocol=self.protocol.name,
            student=self.protocol.student,
            seed=self.seed,
            images=len(self.images),
            updates=self.lengths.updates,
            batch=self.lengths.batch,
            rate=self.protocol.optimizer.lr,
            last=self.curve[-1][1],
            best=max(accuracy for _, accuracy in self.curve),
            curve=tuple(self.curve),
            confusion=tuple(tuple(row) for row in self.confusion.tolist()),
            seconds=self.seconds,
        )


def _targets(train: LabelledImages, classes: int, kind: Labels) -> Tensor:
    """Labels as distributions over the classes: soft ones where they are asked for.

    Where images have weights, a distribution is multiplied by that of its image, in units of their
    mean: the loss is linear in it, and images that are mixed mix their weights, too.
    """
    if train.soft is not None and kind == "stored":
        targets = train.soft.float()
    else:
        targets = F.one_hot(train.labels.long(), classes).float()
    if train.weights is None:
        return targets
    return targets * (train.weights / train.weights.mean()).float()[:, None].to(targets.device)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    curve: list[tuple[int, float]],
    seconds: float,
) -> None:
    """Write weights, buffers, the optimiser's tensors, and how far the run has come."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    meta = {"done": str(done), "curve": json.dumps(curve), "seconds": repr(seconds)}
    with writing(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, meta)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[tuple[int, float]], float]:
    """Restore the stored state; return the updates done, the curve so far and the seconds spent.

    A file that is damaged, or of another version, is ignored: the student starts at update 0.
    """
    state: dict[int, dict[str, Tensor]] = {}
    weights = {}
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            for name in file.keys():  # noqa: SIM118  (a handle, not a mapping)
                kind, _, rest = name.partition(".")
                if kind == "model":
                    weights[rest] = file.get_tensor(name)
                else:
                    index, _, key = rest.partition(".")
                    state.setdefault(int(index), {})[key] = file.get_tensor(name)
        curve = [(int(step), float(accuracy)) for step, accuracy in json.loads(meta["curve"])]
        done, seconds = int(meta["done"]), float(meta["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return 0, [], 0.0
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        return 0, [], 0.0
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return done, curve, seconds


def seconds_needed(
    protocol: Protocol,
    classes: int,
    size: int,
    images: int,
    tests: int,
    *,
    device: str | torch.device | None = None,
) -> float:
    """Return how long one student takes on this machine, from one timed step and one timed test."""
    protocol = protocol.settled(classes, size=protocol.size or size)
    size = protocol.size or size
    length = lengths(protocol, images, classes)
    count = min(length.batch, _PROBE)  # a whole batch of large images would take minutes by itself
    probe = replace(
        protocol,
        size=size,
        batch=((1, count),),
        length=Updates(1),
        tests=Intervals(),
        # the teacher's own forward is the small part
        labels="hard" if protocol.labels == "teacher" else protocol.labels,
    )
    sample = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    train = LabelledImages(sample, torch.arange(count) % classes)

    def timed(updates: int, tested: int) -> float:
        labels = torch.zeros(tested, dtype=torch.long)
        test = LabelledImages(sample[:1].expand(tested, -1, -1, -1), labels)
        began = time.monotonic()
        train_student(train, test, probe, 0, classes=classes, updates=updates, device=device)
        return time.monotonic() - began

    timed(1, 1)
    one = timed(1, 1)
    step = max(timed(3, 1) - one, 1e-4) / 2
    each_test = max(timed(1, 1 + _PROBE) - one, 1e-4) / _PROBE
    number = protocol.tests.count(length.units)
    return step * length.batch / count * length.updates + each_test * tests * number
