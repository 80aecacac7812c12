"""A small ResNet trained on the source itself, once for each source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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
from d3pack.system import Events, Journal, can_write, fast_bfloat16, replace_file
from d3pack.teachers.teacher import fit

MAX_BYTES = 512 * 1024 * 1024  # of decoded images kept in memory
SAMPLES = 250_000  # images that the training of a teacher sees
CHECKPOINTS = 20  # a killed training loses at most this part of itself
_BY_CHANCE = (
    "warning: the teacher does no better than chance on images held out; what it chooses and"
    " labels is random. Give more images, or name a teacher"
)
_MEAN, _DEVIATION = 0.47, 0.25  # of the values of images, which the network sees normalised
_QUINTIC = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration: steepest at 0
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """How a teacher is trained; part of the key under which it is cached."""

    size: int
    samples: int
    batch: int = 256
    lr: float = 0.15
    conv_lr: float = 0.24  # of convolutions, whose steps are orthogonal
    weight_decay: float = 5e-4
    smoothing: float = 0.1
    widths: tuple[int, ...] = (48, 96, 192)
    held: float = 0.05  # share of the images held out
    epochs: int = 40  # at most, for small sources
    growth: tuple[tuple[float, float], ...] = ((0.4, 0.5), (0.75, 0.75), (1.0, 1.0))
    seed: int = 0
    bf16: bool = False  # in training only; logits are float32
    version: int = 2

    def steps(self, images: int) -> int:
        """Return the number of steps on so many images."""
        return max(1, min(self.samples, self.epochs * images) // min(self.batch, images))

    def stages(self) -> list[tuple[float, int]]:
        """Return the progress at which each stage ends, and the side length that it sees."""
        return [(end, round(self.size * share)) for end, share in self.growth]


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
    """A 4x4 convolution of stride 2, then one residual block for each width."""

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


class Muon:
    """Momentum whose steps of convolutions are made orthogonal (kellerjordan.github.io/posts/muon).

    Convolutions keep their norm instead of a decay. All else learns as with SGD.
    """

    def __init__(self, net: nn.Module, config: TeacherConfig) -> None:
        self._config = config
        self._parameters = list(net.parameters())
        # the memory layout decides the order of sums, and so the last bits: it is always this one
        self.momenta = [
            torch.zeros_like(p, memory_format=torch.contiguous_format) for p in self._parameters
        ]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Apply the gradients at a share of the highest rate."""
        config = self._config
        for parameter, momentum in zip(self._parameters, self.momenta, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            if parameter.ndim == 4 and parameter.shape[1] > 3:
                momentum.mul_(0.6).add_(gradient)
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                update = gradient.add(momentum, alpha=0.6)
                change = newton_schulz(update.flatten(1), rounds=3).reshape(update.shape)
                parameter.sub_(change, alpha=config.conv_lr * share)
            else:
                gradient = gradient.add(parameter, alpha=config.weight_decay)
                momentum.mul_(0.9).add_(gradient)
                parameter.sub_(gradient.add(momentum, alpha=0.9), alpha=config.lr * share)


def newton_schulz(matrix: Tensor, rounds: int) -> Tensor:
    """Return the nearest matrix with singular values near one; five rounds bring all there."""
    a, b, c = _QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, b * square + c * (square @ square), x, beta=a)
    nearest: Tensor = x.T if tall else x
    return nearest


class TrainedTeacher:
    """A trained network as a teacher."""

    def __init__(
        self,
        net: SmallResNet,
        config: TeacherConfig,
        classes: Sequence[str],
        record: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self._net = net.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._size = (config.size, config.size)
        self.zero = (round(255 * _MEAN),) * 3
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
    return (values - _MEAN) / _DEVIATION


def square(image: Image.Image, size: int) -> Pixels:
    """Return the centre of an image as (3, size, size)."""
    fits = image.size == (size, size)
    fitted = image if fits else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1)


def gather(
    source: Source, config: TeacherConfig, events: Events
) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Read images of all classes: all of a small source, an even sample of a large one."""
    most = max(1, MAX_BYTES // (3 * config.size**2) // len(source.classes))
    pixels: list[Pixels] = []
    labels: list[int] = []
    with events.stage("read for the teacher", len(source.classes), "classes"):
        for c, count in enumerate(source.counts):
            rng = np.random.Generator(np.random.Philox(key=[config.seed, c]))
            picked = np.sort(rng.permutation(count)[:most])
            # read one at a time, so that only the small copies are in memory
            images = (source.get(c, int(i)) for i in picked)
            usable = [square(image, config.size) for image in images if image is not None]
            if not usable:
                raise SourceError(f"no image of class {source.classes[c]!r} can be read")
            pixels += usable
            labels += [c] * len(usable)
            events.step(c + 1)
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def teacher_cache() -> Path:
    """Return the directory of cached teachers."""
    return cache_home() / "teachers"


def cache_or_work(cache: Path, journal: Journal, events: Events, keys: Iterable[str]) -> Path:
    """Return the directory of cached teachers, or one of the run where that cannot be written.

    Args:
        cache: the directory.
        journal: of the run.
        events: told where the teacher is kept, if it is with the run.
        keys: of the teachers that the run can use; one that is in the cache needs no writing.
    """
    if any((cache / f"{key}.safetensors").exists() for key in keys) or can_write(cache):
        return cache
    events.note(f"{cache} cannot be written: the teacher is kept with this work")
    return journal.path("teachers/kept").parent


def teacher_key(source: Source, config: TeacherConfig, device: str = "cpu") -> str:
    """Return the cache key of a teacher: source, config and what decides its last bits."""
    kind = device.partition(":")[0]
    place = [kind, torch.get_num_threads() if kind == "cpu" else 0, torch.__version__]
    text = json.dumps([source.fingerprint(), asdict(config), place], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train_teacher(
    source: Source,
    config: TeacherConfig,
    journal: Journal,
    events: Events,
    *,
    cache: Path,
    device: str,
    key: str = "",
) -> TrainedTeacher:
    """Return the teacher of a source, from the cache or trained now.

    An interrupted training resumes from the journal.

    Args:
        key: key of a cached teacher to use, instead of that of `config`.
    """
    key = key or teacher_key(source, config, device)
    stored = cache / f"{key}.safetensors"
    cached = _read(stored)
    if cached is None:
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(stored, _train(source, config, journal, events, device, key))
        journal.drop("teacher")
        cached = _read(stored)
        assert cached is not None
    data, weights, figures = cached
    if figures.get("held_accuracy", 1.0) <= 1 / len(source.classes):
        events.note(_BY_CHANCE)
    net = SmallResNet(len(source.classes), config.widths)
    net.load_state_dict(weights)
    record = {
        "kind": "trained",
        "name": f"resnet-{'-'.join(map(str, config.widths))}-{config.size}px",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest()[:32],
        **figures,
    }
    return TrainedTeacher(net, config, source.classes, record, device)


def _read(stored: Path) -> tuple[bytes, dict[str, Tensor], dict[str, Any]] | None:
    """Return bytes, weights and figures of a cached teacher; None if missing or damaged."""
    if not stored.exists():
        return None
    data = stored.read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return data, load_tensors(data), json.loads(header["__metadata__"]["figures"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _train(
    source: Source, config: TeacherConfig, journal: Journal, events: Events, device: str, key: str
) -> bytes:
    pixels, labels = gather(source, config, events)
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 2**32]))
    held, train = hold_back(labels, rng.permutation(len(labels)), config.held)
    net = _fresh(len(source.classes), config).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Muon(net, config)
    batch, steps = min(config.batch, len(train)), config.steps(len(train))
    every = max(1, steps // CHECKPOINTS)
    step = _load_state(journal, net, optimizer, key)
    with events.stage("train the teacher", steps, "steps", part="teacher"):
        while step < steps:
            rows, moves = _batch_plan(len(train), batch, step, config)
            x = _augment(images[train[rows]].to(device), moves)
            x = _resized(x, next(side for end, side in config.stages() if step < end * steps))
            net.train()
            loss = teacher_loss(net, x, targets[train[rows]].to(device), config)
            net.zero_grad(set_to_none=True)
            torch.autograd.backward([loss])
            optimizer.step(_one_cycle(step / steps))
            step += 1
            if step % every == 0 or step == steps:
                _save_state(journal, net, optimizer, step, key)
            if step % 10 == 0 or step == steps:
                events.step(step, loss=round(float(loss.detach()), 4), samples=step * batch)
    figures: dict[str, Any] = {}
    if len(held):
        teacher = TrainedTeacher(net, config, source.classes, {}, device)
        logits = torch.cat([teacher.logits(part) for part in torch.split(images[held], 256)])
        figures["held_accuracy"] = round(
            float((logits.argmax(1) == targets[held]).float().mean()), 4
        )
        accuracy = 100 * figures["held_accuracy"]
        events.note(f"teacher: {accuracy:.1f} % on {len(held)} images held out")
    state = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    data: bytes = save_tensors(state, metadata={"figures": json.dumps(figures)})
    return data


def hold_back(
    labels: npt.NDArray[np.int64], order: npt.NDArray[np.int64], share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the rows of an order into those held out and those to train on, (held, train).

    A class that would have no row to train on keeps its first one.
    """
    count = int(len(order) * share)
    covered = set(labels[order[count:]].tolist())
    spared = []
    for place, label in enumerate(labels[order[:count]].tolist()):
        if label not in covered:
            covered.add(label)
            spared.append(place)
    held = np.delete(order[:count], spared)
    return held, np.concatenate([order[spared], order[count:]])


def _fresh(classes: int, config: TeacherConfig) -> SmallResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SmallResNet(classes, config.widths)


def _one_cycle(progress: float) -> float:
    return min(progress / 0.2, 1.0) if progress < 0.2 else (1 - progress) / 0.8


def _batch_plan(
    rows: int, batch: int, step: int, config: TeacherConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return rows and augmentation of one step, a function of the step alone."""
    per_epoch = rows // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.Generator(np.random.Philox(key=[config.seed + 1, epoch])).permutation(rows)
    draw = np.random.Generator(np.random.Philox(key=[config.seed + 2, step]))
    reach = max(1, config.size // 8)
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
    """Flip half of the images and shift all of them, with reflected borders."""
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


def _resized(values: Tensor, side: int) -> Tensor:
    if values.shape[-1] == side:
        return values
    return functional.interpolate(values, (side, side), mode="bilinear", antialias=True)


def teacher_loss(net: SmallResNet, x: Tensor, target: Tensor, config: TeacherConfig) -> Tensor:
    """Return the loss of one step."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16):
        answers = net(x)
    return functional.cross_entropy(answers.float(), target, label_smoothing=config.smoothing)


def _save_state(journal: Journal, net: nn.Module, optimizer: Muon, step: int, key: str) -> None:
    arrays = {f"net.{name}": value.cpu().numpy() for name, value in net.state_dict().items()}
    arrays |= {f"momentum.{i}": value.cpu().numpy() for i, value in enumerate(optimizer.momenta)}
    journal.save("teacher/state", arrays, {"step": step, "key": key})


def _load_state(journal: Journal, net: nn.Module, optimizer: Muon, key: str) -> int:
    saved = journal.load("teacher/state")
    if saved is None or saved[1].get("key") != key:  # the state of another teacher
        return 0
    arrays, facts = saved
    net.load_state_dict(
        {k.removeprefix("net."): torch.from_numpy(v) for k, v in arrays.items() if k[:4] == "net."}
    )
    for i, momentum in enumerate(optimizer.momenta):
        momentum.copy_(torch.from_numpy(arrays[f"momentum.{i}"]))
    return int(facts["step"])


def teacher_config(typical: int, samples: int, seed: int, device: str = "cpu") -> TeacherConfig:
    """Return the configuration for images of a typical side length on this machine."""
    size = 32 if typical <= 40 else 64
    # four times the pixels cost four times as much
    most = max(1, samples * 32**2 // size**2)
    return TeacherConfig(size, most, seed=seed, bf16=fast_bfloat16(device))
