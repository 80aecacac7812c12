"""`--teacher train`: a small ResNet fitted to the source itself, once for each source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional

from d3pack.backbones import cache_home
from d3pack.errors import SourceError
from d3pack.sources import Source
from d3pack.system.events import Events
from d3pack.system.journal import Journal, write_whole
from d3pack.teachers.teacher import fit

MAX_BYTES = 512 * 1024 * 1024  # of decoded images kept in memory
CHECKPOINTS = 20  # a killed training loses at most this part of itself
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Lesson:
    """How the teacher is trained. Part of the key under which it is remembered."""

    size: int
    samples: int
    batch: int = 128
    lr: float = 0.15
    weight_decay: float = 5e-4
    smoothing: float = 0.1
    widths: tuple[int, ...] = (48, 96, 192)
    held: float = 0.05  # share of the images that only measure
    epochs: int = 40  # at most: small sources are not worn out
    seed: int = 0
    bf16: bool = False  # in training alone; answers are float32
    version: int = 1


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.skip = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + (x if self.skip is None else self.skip(x)))


class SmallResNet(nn.Module):
    """4x4 patches in steps of two, then one residual block a width."""

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        inner = (widths[0], *widths)
        self.blocks = nn.Sequential(
            *(_Block(inner[i], width, 1 + (i > 0)) for i, width in enumerate(widths))
        )
        self.head = nn.Linear(widths[-1], classes)

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(functional.relu(self.norm(self.stem(x))))
        return out.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


class TrainedTeacher:
    """A trained net with the statistics of its source."""

    def __init__(
        self,
        net: SmallResNet,
        lesson: Lesson,
        classes: Sequence[str],
        record: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self._net = net.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._size = (lesson.size, lesson.size)
        self.classes = tuple(classes)
        self.record: Mapping[str, Any] = dict(record)

    def _ready(self, images: Tensor) -> Tensor:
        return _normal(fit(images.to(self._device), self._size))

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self._net(self._ready(images))
        return out.float().cpu()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        return self._net.embed(self._ready(images)).float().cpu()


def _normal(values: Tensor) -> Tensor:
    return (values - 0.47) / 0.25


def square(image: Image.Image, size: int) -> Pixels:
    """The middle of an image as (3, size, size)."""
    fits = image.size == (size, size)
    fitted = image if fits else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1)


def gather(source: Source, lesson: Lesson, events: Events) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Images of all classes in memory: all of a small source, an even sample of a large one."""
    most = max(1, MAX_BYTES // (3 * lesson.size**2) // len(source.classes))
    pixels: list[Pixels] = []
    labels: list[int] = []
    with events.stage("read for the teacher", len(source.classes), "classes"):
        for c, count in enumerate(source.counts):
            rng = np.random.Generator(np.random.Philox(key=[lesson.seed, c]))
            picked = np.sort(rng.permutation(count)[:most])
            # one at a time: only the small copies of a class are ever held together
            found = (source.get(c, int(i)) for i in picked)
            usable = [square(image, lesson.size) for image in found if image is not None]
            if not usable:
                raise SourceError(f"no image of class {source.classes[c]!r} can be read")
            pixels += usable
            labels += [c] * len(usable)
            events.step(c + 1)
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def teacher_directory() -> Path:
    """Return where trained teachers are kept, for all runs."""
    return cache_home() / "teachers"


def teacher_key(source: Source, lesson: Lesson, device: str = "cpu") -> str:
    """Names a teacher by its source, its lesson and what decides about its last bits."""
    kind = device.partition(":")[0]
    place = [kind, torch.get_num_threads() if kind == "cpu" else 0, torch.__version__]
    text = json.dumps([source.fingerprint(), asdict(lesson), place], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train_teacher(
    source: Source,
    lesson: Lesson,
    journal: Journal,
    events: Events,
    *,
    cache: Path,
    device: str,
    key: str = "",
) -> TrainedTeacher:
    """The teacher of this source: remembered, or trained (going on where a killed run stopped).

    `key` names one of the cache that has to be the teacher.
    """
    key = key or teacher_key(source, lesson, device)
    stored = cache / f"{key}.safetensors"
    found = _read(stored)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(stored, _train(source, lesson, journal, events, device, key))
        journal.drop("teacher")
        found = _read(stored)
        assert found is not None
    data, weights, figures = found
    net = SmallResNet(len(source.classes), lesson.widths)
    net.load_state_dict(weights)
    record = {
        "kind": "trained",
        "name": f"resnet-{'-'.join(map(str, lesson.widths))}-{lesson.size}px",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest()[:32],
        **figures,
    }
    return TrainedTeacher(net, lesson, source.classes, record, device)


def _read(stored: Path) -> tuple[bytes, dict[str, Tensor], dict[str, Any]] | None:
    """Bytes, weights and figures of a teacher; None where it is missing or not whole."""
    if not stored.exists():
        return None
    data = stored.read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return data, load_tensors(data), json.loads(header["__metadata__"]["figures"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _train(
    source: Source, lesson: Lesson, journal: Journal, events: Events, device: str, key: str
) -> bytes:
    pixels, labels = gather(source, lesson, events)
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    rng = np.random.Generator(np.random.Philox(key=[lesson.seed, 2**32]))
    held, train = hold_back(labels, rng.permutation(len(labels)), lesson.held)
    net = _fresh(len(source.classes), lesson).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=lesson.lr,
        momentum=0.9,
        weight_decay=lesson.weight_decay,
        nesterov=True,
    )
    batch = min(lesson.batch, len(train))
    steps = max(1, min(lesson.samples, lesson.epochs * len(train)) // batch)
    every = max(1, steps // CHECKPOINTS)
    step = _restore(journal, net, optimizer, key)
    with events.stage("train the teacher", steps, "steps"):
        while step < steps:
            rows, moves = _batch_plan(len(train), batch, step, lesson)
            x = _augment(images[train[rows]].to(device), moves)
            for group in optimizer.param_groups:
                group["lr"] = lesson.lr * _one_cycle(step / steps)
            net.train()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=lesson.bf16):
                answers = net(x)
            loss = functional.cross_entropy(
                answers.float(), targets[train[rows]].to(device), label_smoothing=lesson.smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([loss])
            optimizer.step()
            step += 1
            if step % every == 0 or step == steps:
                _remember(journal, net, optimizer, step, key)
            if step % 10 == 0 or step == steps:
                events.step(step, loss=round(float(loss.detach()), 4), samples=step * batch)
    figures: dict[str, Any] = {}
    if len(held):
        taught = TrainedTeacher(net, lesson, source.classes, {}, device)
        judged = torch.cat([taught.logits(part) for part in torch.split(images[held], 256)])
        figures["held_accuracy"] = round(
            float((judged.argmax(1) == targets[held]).float().mean()), 4
        )
        events.note(
            f"teacher: {100 * figures['held_accuracy']:.1f} % on {len(held)} images held back"
        )
    state = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    data: bytes = save_tensors(state, metadata={"figures": json.dumps(figures)})
    return data


def hold_back(
    labels: npt.NDArray[np.int64], order: npt.NDArray[np.int64], share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first rows of an order only measure, the others teach; (held, train).

    Of a class that would be left without a row to learn from, the first drawn teaches too.
    """
    count = int(len(order) * share)
    taught = set(labels[order[count:]].tolist())
    spared = []
    for place, label in enumerate(labels[order[:count]].tolist()):
        if label not in taught:
            taught.add(label)
            spared.append(place)
    held = np.delete(order[:count], spared)
    return held, np.concatenate([order[spared], order[count:]])


def _fresh(classes: int, lesson: Lesson) -> SmallResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        return SmallResNet(classes, lesson.widths)


def _one_cycle(progress: float) -> float:
    return min(progress / 0.2, 1.0) if progress < 0.2 else (1 - progress) / 0.8


def _batch_plan(
    rows: int, batch: int, step: int, lesson: Lesson
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers and augmentation of one step: a function of the step alone."""
    per_epoch = rows // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.Generator(np.random.Philox(key=[lesson.seed + 1, epoch])).permutation(rows)
    draw = np.random.Generator(np.random.Philox(key=[lesson.seed + 2, step]))
    reach = max(1, lesson.size // 8)
    moves = np.stack(
        [
            draw.integers(0, 2, batch),
            draw.integers(-reach, reach + 1, batch),
            draw.integers(-reach, reach + 1, batch),
        ],
        axis=1,
    )
    return order[place * batch : (place + 1) * batch], moves


def _augment(images: Tensor, moves: npt.NDArray[np.int64]) -> Tensor:
    """Mirror half of the images and shift all, with reflected borders."""
    reach = max(1, int(np.abs(moves[:, 1:]).max()))
    values = _normal(images.float() / 255)
    flips = torch.from_numpy(moves[:, 0].astype(bool)).to(values.device)
    values = torch.where(flips.reshape(-1, 1, 1, 1), values.flip(3), values)
    wide = functional.pad(values, (reach,) * 4, mode="reflect")
    side = images.shape[-1]
    shifted = [
        wide[i, :, reach + y : reach + y + side, reach + x : reach + x + side]
        for i, (_, y, x) in enumerate(moves.tolist())
    ]
    return torch.stack(shifted).contiguous(memory_format=torch.channels_last)


def _remember(
    journal: Journal, net: nn.Module, optimizer: torch.optim.SGD, step: int, key: str
) -> None:
    arrays = {f"net.{name}": value.cpu().numpy() for name, value in net.state_dict().items()}
    for i, parameter in enumerate(net.parameters()):
        arrays[f"momentum.{i}"] = optimizer.state[parameter]["momentum_buffer"].cpu().numpy()
    journal.save("teacher/state", arrays, {"step": step, "key": key})


def _restore(journal: Journal, net: nn.Module, optimizer: torch.optim.SGD, key: str) -> int:
    found = journal.load("teacher/state")
    if found is None or found[1].get("key") != key:  # half of another teacher is none of this one
        return 0
    arrays, facts = found
    net.load_state_dict(
        {k.removeprefix("net."): torch.from_numpy(v) for k, v in arrays.items() if k[:4] == "net."}
    )
    for i, parameter in enumerate(net.parameters()):
        buffer = torch.from_numpy(arrays[f"momentum.{i}"]).to(parameter)
        # the layout decides the order of sums: in another one the last bit would differ
        if parameter.is_contiguous(memory_format=torch.channels_last) and parameter.ndim == 4:
            buffer = buffer.contiguous(memory_format=torch.channels_last)
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return int(facts["step"])


def lesson_for(typical: int, samples: int, seed: int, device: str = "cpu") -> Lesson:
    """The lesson for images of a typical side length, on this machine."""
    size = 32 if typical <= 40 else 64
    # two to three times as fast where the processor has instructions for it, else far slower
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    bf16 = not device.startswith("cpu") or bool(supported())
    # four times the pixels cost four times the work
    return Lesson(size, max(1, samples * 32**2 // size**2), seed=seed, bf16=bf16)
