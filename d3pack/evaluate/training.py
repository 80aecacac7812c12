"""One student: trained from scratch on images in memory, tested on real ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3pack.decode import reproducible_cuda
from d3pack.errors import UsageError
from d3pack.evaluate import augment, students
from d3pack.evaluate.checkpoint import load_checkpoint, save_checkpoint
from d3pack.evaluate.presets import AdamW, Exams, Preset, Steps, Updates, by_images

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CPU_CHUNK = 16  # so few images that a layer's activations stay in the processor's cache
_TEST_CHUNK = 64
_PROBE = 8  # images of the batch that tells how long a student takes
_SAVE_EVERY = 60.0  # seconds: what a stopped run loses at most

Teach = Callable[[Tensor], Tensor]  # uint8 images -> logits
Progress = Callable[[int, int], None]  # updates done, updates in all


@dataclass(frozen=True, slots=True)
class History:
    """What became of one student."""

    preset: str
    student: str
    seed: int
    images: int
    updates: int
    batch: int
    last: float  # accuracy on the test images, 0..1
    best: float
    curve: tuple[tuple[int, float], ...]  # (updates done, accuracy)
    confusion: tuple[tuple[int, ...], ...]  # rows: truth, columns: answer, at the end
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> History:
        curve = tuple((int(step), float(accuracy)) for step, accuracy in data["curve"])
        confusion = tuple(tuple(int(n) for n in row) for row in data["confusion"])
        return cls(**{**data, "curve": curve, "confusion": confusion})


@dataclass(frozen=True, slots=True)
class Plan:
    """The lengths that a preset takes for one set of images."""

    batch: int
    updates: int
    units: int  # what schedule and tests count: epochs, or updates
    per_unit: int  # updates in a unit

    def unit(self, update: int) -> int:
        return min(update // self.per_unit, self.units - 1)


def plan(preset: Preset, images: int, classes: int, updates: int | None = None) -> Plan:
    """Lengths for `images` in all; `updates` fixes the budget of steps, as baselines need it."""
    per_class = max(1, images // classes)
    batch = by_images(preset.batch, per_class)
    if isinstance(preset.length, Updates):
        count = updates or preset.length.count
        return Plan(batch, count, count, 1)
    batch = min(batch, images)
    per_epoch = math.ceil(images / batch)
    total = updates or preset.units(per_class) * per_epoch
    return Plan(batch, total, math.ceil(total / per_epoch), per_epoch)


def _rng(seed: int, stream: int, position: int) -> torch.Generator:
    """A generator for one place in the run: a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed(((seed << 2 | stream) << 40 | position) % (1 << 63))


def _indices(plan: Plan, images: int, seed: int, start: int) -> Iterator[Tensor]:
    """The images of each update: epochs are cut into batches, or run on from one to the next."""
    if plan.per_unit == 1 and plan.updates == plan.units:
        stream, epoch = torch.empty(0, dtype=torch.long), start * plan.batch // images
        skip = start * plan.batch - epoch * images
        for _ in range(start, plan.updates):
            while len(stream) < plan.batch + skip:
                stream = torch.cat([stream, torch.randperm(images, generator=_rng(seed, 0, epoch))])
                epoch += 1
            stream, skip = stream[skip:], 0
            yield stream[: plan.batch]
            stream = stream[plan.batch :]
        return
    for update in range(start, plan.updates):
        epoch, place = divmod(update, plan.per_unit)
        order = torch.randperm(images, generator=_rng(seed, 0, epoch))
        yield order[place * plan.batch : (place + 1) * plan.batch]


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, in 0..1."""
    values = images.to(torch.float64) / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def fit(images: Tensor, size: int, *, resize: float = 1.0) -> Tensor:
    """Uint8 images of any one shape -> (N, 3, size, size): shorter side, then centre crop."""
    height, width = images.shape[2:]
    side = round(size * resize)
    if (height, width) != (side, side):
        scale = side / min(height, width)
        shape = [max(side, round(height * scale)), max(side, round(width * scale))]
        parts = [
            F.interpolate(part.float(), shape, mode="bicubic", antialias=True, align_corners=False)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            for part in torch.split(images, 1024)
        ]
        images = torch.cat(parts) if parts else images.new_empty((0, 3, *shape))
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size].contiguous()


def _optimizer(preset: Preset, model: nn.Module) -> torch.optim.Optimizer:
    choice = preset.optimizer
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


class _Images:
    """Uint8 images on the device -> normalised floats."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def to_uint8(self, x: Tensor) -> Tensor:
        return ((x * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _step(
    preset: Preset,
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    chunk: int,
) -> None:
    """Gradients of the mean loss of a batch, in chunks (exact: nothing couples the images)."""
    temperature = preset.temperature
    for part, wanted in zip(torch.split(x, chunk), torch.split(targets, chunk), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=preset.precision == "bfloat16"):
            logits = model(part)
        logits = logits.float()
        if preset.labels == "teacher":
            loss = F.kl_div(F.log_softmax(logits / temperature, 1), wanted, reduction="sum")
        else:
            loss = F.cross_entropy(logits, wanted, reduction="sum")
        (loss / len(x)).backward()


@torch.no_grad()
def _test(
    preset: Preset, model: nn.Module, images: Tensor, labels: Tensor, scaler: _Images, classes: int
) -> Tensor:
    """The confusion matrix (truth, answer)."""
    model.eval()
    answers = []
    for part in torch.split(images, _TEST_CHUNK):
        x = scaler.normalise(part.to(scaler.mean.device).float() / 255)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=preset.precision == "bfloat16"):
            answers.append(model(x).argmax(1).cpu())
    model.train()
    flat = labels.cpu() * classes + torch.cat(answers)
    return torch.bincount(flat, minlength=classes * classes).view(classes, classes)


def train_student(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    preset: Preset,
    seed: int,
    *,
    student: str | None = None,
    classes: int | None = None,
    updates: int | None = None,
    statistics_of: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    teacher: Teach | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> History:
    """Train on uint8 images (N, 3, H, W) and integer or soft (N, C) labels, then test.

    The same seed, machine and number of threads give the same student: CUDA's settings are held as
    for exact images, whatever the program around has set. `updates` replaces the
    preset's own length, `checkpoint` makes a long run resumable.
    """
    device = torch.device(device)
    if len(images) == 0 or len(test_images) == 0:
        which = "training" if len(images) == 0 else "test"
        raise UsageError(f"no {which} images", hint="check the folders and the class names")
    classes = classes or (labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1)
    size = preset.size or min(test_images.shape[2:])
    if preset.size is None and test_images.shape[2] != test_images.shape[3]:
        raise UsageError(
            f"preset {preset.name} wants square test images, these are"
            f" {test_images.shape[3]}x{test_images.shape[2]}",
            hint="give a size",
        )
    if preset.labels == "teacher" and teacher is None:
        raise UsageError(
            f"preset {preset.name} relabels every augmented image by a teacher",
            hint="give --teacher, or a preset with stored or hard labels",
        )
    images = fit(images, size).to(device)
    test_images = fit(test_images, size, resize=preset.test_resize)
    targets = labels.to(device)
    if targets.ndim == 2 and preset.labels == "hard":
        targets = targets.argmax(1)
    if targets.ndim == 1:
        targets = F.one_hot(targets.long(), classes)
    targets = targets.float()

    if preset.normalise == "imagenet":
        mean_std: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    else:
        mean_std = statistics_of or statistics(images)
    scaler = _Images(*mean_std, device)
    name = student or preset.student
    model = students.build(name, classes, size, norm=preset.norm, seed=seed).to(device)
    model.train()
    optimizer = _optimizer(preset, model)
    lengths = plan(preset, len(images), classes, updates)
    whole = device.type != "cpu" or _has_batch_norm(model)
    chunk = lengths.batch if whole else _CPU_CHUNK

    curve: list[tuple[int, float]] = []
    start, seconds = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        start, curve, seconds = load_checkpoint(checkpoint, model, optimizer)
    began = saved = time.monotonic()
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    with reproducible_cuda():
        indices = _indices(lengths, len(images), seed, start)
        for update, chosen in enumerate(indices, start):
            rng, unit = _rng(seed, 1, update), lengths.unit(update)
            if isinstance(preset.schedule, Steps) and preset.schedule.fresh_momentum:
                turn = preset.schedule.passed(unit, lengths.units)
                before = preset.schedule.passed(lengths.unit(max(update - 1, 0)), lengths.units)
                if turn != before:
                    optimizer = _optimizer(preset, model)
            for group in optimizer.param_groups:
                group["lr"] = preset.optimizer.lr * preset.schedule.factor(unit, lengths.units)
            chosen = chosen.to(device)
            x = augment.apply(preset.pixel_ops, images[chosen].float() / 255, rng)
            x = augment.apply(preset.batch_ops, scaler.normalise(x), rng)
            wanted = targets[chosen]
            if preset.mix is not None:
                x, wanted = preset.mix(x, wanted, rng)
            if preset.labels == "teacher" and teacher is not None:
                with torch.no_grad():
                    wanted = teacher(scaler.to_uint8(x)).to(device)
                    wanted = F.softmax(wanted.float() / preset.temperature, 1)
            optimizer.zero_grad()
            _step(preset, model, x, wanted, chunk)
            optimizer.step()

            done = update + 1
            ends_unit = done % lengths.per_unit == 0 or done == lengths.updates
            if ends_unit and preset.exams.due(unit, lengths.units):
                confusion = _test(preset, model, test_images, test_labels, scaler, classes)
                curve.append((done, float(confusion.trace() / confusion.sum())))
            if progress is not None:
                progress(done, lengths.updates)
            late = time.monotonic() - saved > _SAVE_EVERY
            if checkpoint is not None and late and done < lengths.updates:
                saved = time.monotonic()
                save_checkpoint(checkpoint, model, optimizer, done, curve, seconds + saved - began)
    return History(
        preset=preset.name,
        student=name,
        seed=seed,
        images=len(images),
        updates=lengths.updates,
        batch=lengths.batch,
        last=curve[-1][1],
        best=max(accuracy for _, accuracy in curve),
        curve=tuple(curve),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        seconds=seconds + time.monotonic() - began,
    )


def seconds_needed(
    preset: Preset,
    student: str | None,
    classes: int,
    size: int,
    images: int,
    tests: int,
    *,
    device: str | torch.device = "cpu",
) -> float:
    """How long one student takes on this machine, from one timed step and one timed test."""
    lengths = plan(preset, images, classes)
    size = preset.size or size
    count = min(lengths.batch, _PROBE)  # a whole batch of large images would take minutes by itself
    probe = replace(preset, size=size, batch=((1, count),), length=Updates(1), exams=Exams())
    if preset.labels == "teacher":  # its own forward is the small part
        probe = replace(probe, labels="hard")
    sample = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(count) % classes

    def timed(updates: int, tested: int) -> float:
        began = time.monotonic()
        train_student(
            sample,
            labels,
            sample[:1].expand(tested, -1, -1, -1),
            torch.zeros(tested, dtype=torch.long),
            probe,
            0,
            student=student,
            classes=classes,
            updates=updates,
            device=device,
        )
        return time.monotonic() - began

    timed(1, 1)
    one = timed(1, 1)
    step = max(timed(3, 1) - one, 1e-4) / 2
    test = max(timed(1, 1 + _PROBE) - one, 1e-4) / _PROBE
    return step * lengths.batch / count * lengths.updates + test * tests * preset.exams.count(
        lengths.units
    )
