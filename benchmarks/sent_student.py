"""What data buys that a model does not: a trained student sent in place of a pack of equal bytes.

    python -m benchmarks sent_student cifar10 --real cifar10 --work work --budgets 6000,30000

The student is a narrow ConvNet-3, trained on all real training images with weights that are
rounded while it learns, so that its packed weights fit into the bytes of the pack, which may be
fewer than its budget. Width and bits are chosen on training images that were held back. A receiver
who wants another architecture has no images: the sent student labels images of the backbone's
class names, which cost no bytes, and the other student learns those labels. The same student taught
by the pack stands beside it. `--real` and `--work` are those of `table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.results import RESULTS, code, command, load, save
from benchmarks.table import Arguments as TableArguments
from benchmarks.table import open_table, say
from benchmarks.table import parser as table_parser
from d3pack.evaluate import Bench
from d3pack.students import LabelledImages, Protocol, fit, train_student
from d3pack.students.networks import STUDENTS, ConvNet
from d3pack.students.protocols import Updates

WHAT = "A trained student sent in place of a pack of equal bytes"
BITS = (2, 3, 4, 8)
UPDATES = 30_000  # of the sent student, on all real images: 38 passes over CIFAR-10
PILOT_UPDATES = 3_000
HELD_BACK = 500  # images of each class, which choose width and bits


class Rounded(nn.Module):
    """Weights as whole multiples of one step a row; gradients pass as if they were not rounded."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def steps(self, weight: Tensor) -> Tensor:
        """Return the step of each row, as it is sent: two bytes."""
        rows = weight.detach().flatten(1)
        if self.most == 1:  # -1, 0, 1: the mean of what is not rounded to 0
            large = rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True)
            step = (rows.abs() * large).sum(1) / large.sum(1).clamp(min=1)
        else:
            step = rows.abs().amax(1) / self.most
        return step.clamp(min=1e-4).half().float().view(-1, *[1] * (weight.ndim - 1))

    def codes(self, weight: Tensor) -> Tensor:
        """Return the multiples."""
        return (weight / self.steps(weight)).round().clamp(-self.most, self.most)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.codes(weight) * self.steps(weight) - weight).detach()


class SentConvNet(ConvNet):
    """ConvNet-3 of any width whose convolutions and classifier have rounded weights."""

    def __init__(self, classes: int, size: int, width: int, bits: int) -> None:
        super().__init__(3, classes, size, "instance", width)
        for layer in self.rounded():
            parametrize.register_parametrization(layer, "weight", Rounded(bits))

    def rounded(self) -> Iterator[Any]:
        """Yield the layers with rounded weights."""
        yield from (layer for layer in self.features if isinstance(layer, nn.Conv2d))
        yield self.classifier

    def vectors(self) -> Iterator[Tensor]:
        """Yield the parameters that are sent in two bytes each."""
        yield from (value for value in self.parameters() if value.ndim == 1)


def count_bytes(classes: int, size: int, width: int, bits: int) -> int:
    """Return the bytes of a packed student."""
    side = size >> 3
    weights = 27 * width + 2 * 9 * width**2 + classes * width * side**2
    halves = (3 * width + classes) + (9 * width + classes)  # steps; biases and norms
    return math.ceil(weights * bits / 8) + 2 * halves


def widest(classes: int, size: int, bits: int, budget: int) -> int:
    """Return the greatest width that fits; 0 where none does."""
    width = 0
    while count_bytes(classes, size, width + 1, bits) <= budget:
        width += 1
    return width


def pack_weights(model: SentConvNet, bits: int) -> bytes:
    """Return the whole student as bytes: multiples of `bits` bits, then numbers of two bytes."""
    codes, halves = [], []
    for layer in model.rounded():
        rounding = layer.parametrizations["weight"]
        weight = rounding.original
        codes.append(rounding[0].codes(weight).flatten())
        halves.append(rounding[0].steps(weight).flatten())
    most = 2 ** (bits - 1) - 1
    values = (torch.cat(codes).detach() + most).to(torch.uint8).numpy()
    planes = np.unpackbits(values[:, None], axis=1)[:, 8 - bits :]
    halves += list(model.vectors())
    return np.packbits(planes).tobytes() + torch.cat(halves).detach().half().numpy().tobytes()


def unpack_weights(data: bytes, model: SentConvNet, bits: int) -> SentConvNet:
    """Put packed weights into a student of the same shape."""
    layers = list(model.rounded())
    counts = [layer.weight.numel() for layer in layers]
    packed = math.ceil(sum(counts) * bits / 8)
    planes = np.unpackbits(np.frombuffer(data[:packed], np.uint8))[: sum(counts) * bits]
    planes = np.pad(planes.reshape(-1, bits), ((0, 0), (8 - bits, 0)))
    most = 2 ** (bits - 1) - 1
    codes = torch.from_numpy(np.packbits(planes, axis=1)[:, 0].astype(np.float32)) - most
    halves = torch.from_numpy(np.frombuffer(data[packed:], np.float16).astype(np.float32))
    rows = [layer.weight.shape[0] for layer in layers]
    steps = torch.split(halves[: sum(rows)], rows)
    rest = halves[sum(rows) :]
    with torch.no_grad():
        for layer, code, step in zip(layers, torch.split(codes, counts), steps, strict=True):
            shape = layer.weight.shape
            parametrize.remove_parametrizations(layer, "weight")
            layer.weight.copy_((code.view(shape[0], -1) * step[:, None]).view(shape))
        for vector in model.vectors():
            vector.copy_(rest[: vector.numel()])
            rest = rest[vector.numel() :]
    return model


class Sent:
    """The student that takes so many bytes."""

    def __init__(self, protocol: Protocol, classes: int, size: int, budget: int) -> None:
        self.protocol, self.classes, self.size, self.budget = protocol, classes, size, budget

    def learn(
        self, train: LabelledImages, test: LabelledImages, bits: int, updates: int, seed: int
    ) -> tuple[float, bytes]:
        """Train one on real images; return its accuracy, as received, and its bytes."""
        width = widest(self.classes, self.size, bits, self.budget)
        made: list[SentConvNet] = []

        def build(classes: int, size: int, norm: str) -> nn.Module:
            made.append(SentConvNet(classes, size, width, bits))
            return made[-1]

        STUDENTS["sent"] = build
        protocol = replace(self.protocol, student="sent", labels="hard", length=Updates(updates))
        train_student(train, test, protocol, seed, classes=self.classes, device="cpu")
        del STUDENTS["sent"]
        data = pack_weights(made[0], bits)
        assert len(data) == count_bytes(self.classes, self.size, width, bits)
        received = self.receive(data, bits)
        answers = received(test.images).argmax(1)
        return float((answers == test.labels).float().mean()), data

    def receive(self, data: bytes, bits: int) -> Any:
        """Return a function of uint8 images to logits."""
        width = widest(self.classes, self.size, bits, self.budget)
        fresh = SentConvNet(self.classes, self.size, width, bits)
        model = unpack_weights(data, fresh, bits).eval()
        mean, std = (torch.tensor(v)[:, None, None] for v in self.protocol.normalise)

        @torch.no_grad()
        def logits(images: Tensor) -> Tensor:
            parts = torch.split(fit(images, self.size, resample=self.protocol.resample), 256)
            return torch.cat([model((part.float() / 255 - mean) / std) for part in parts])

        return logits

    def choose(self, train: LabelledImages) -> tuple[int, dict[str, float]]:
        """Return the bits that do best on training images that were held back."""
        held = torch.zeros(len(train.labels), dtype=torch.bool)
        for label in range(self.classes):
            held[torch.nonzero(train.labels == label)[-HELD_BACK:, 0]] = True
        rest = LabelledImages(train.images[~held], train.labels[~held])
        judge = LabelledImages(train.images[held], train.labels[held])
        scores = {}
        for bits in BITS:
            if widest(self.classes, self.size, bits, self.budget):
                scores[bits] = self.learn(rest, judge, bits, PILOT_UPDATES, 0)[0]
                say(f"{self.budget:,} B, {bits} bits, held back: {scores[bits]:.1%}")
        best = max(scores, key=lambda bits: scores[bits])
        return best, {str(bits): round(score, 4) for bits, score in scores.items()}


def others(
    bench: Bench, student: str, teach: Any, names: LabelledImages, pack: LabelledImages, seed: int
) -> dict[str, float]:
    """Return accuracies of another architecture, taught by the sent student and by the pack."""
    protocol = replace(bench.protocol, student=student, labels="stored")

    def accuracy(train: LabelledImages) -> float:
        classes = len(bench.train.classes)
        return train_student(train, bench.test, protocol, seed, classes=classes, device="cpu").last

    labelled = replace(names, soft=torch.softmax(teach(names.images).float(), 1))
    return {
        "sent student labels images of class names": accuracy(labelled),
        "pack": accuracy(pack),
    }


class Arguments(TableArguments):
    """What the command line says."""

    other: str


def main(arguments: Sequence[str]) -> None:
    parser = table_parser(__doc__)
    parser.add_argument("--other", default="resnetap10", help="another architecture [%(default)s]")
    parser.set_defaults(budgets="6000,30000")
    args = parser.parse_args(arguments, namespace=Arguments())
    table = open_table(parser, args)
    train = table.train
    named = table.names()
    assert named is not None
    names = named.build(0)
    for budget in map(int, args.budgets.split(",")):
        entry = table.pack_entry(budget)
        assert entry is not None
        assert entry.pack is not None
        total = entry.pack.ledger().total
        sent = Sent(table.bench.protocol, len(train.classes), train.size, min(budget, total))
        bits, scores = sent.choose(train.all())
        facts = {
            "bits": bits, "held_back": scores, "protocol": args.protocol, "other": args.other,
            "updates": UPDATES, "pack": {"bytes": total, "root": entry.pack.root}, "code": code(),
        }  # fmt: skip
        for seed in range(args.seeds):
            own, data = sent.learn(train.all(), table.bench.test, bits, UPDATES, seed)
            say(f"{total:,} B, {bits} bits, seed {seed}: {own:.1%} in {len(data):,} B")
            teach = sent.receive(data, bits)
            passed = others(table.bench, args.other, teach, names, entry.build(seed), seed)
            say(f"  {args.other}: {passed}")
            row: dict[str, Any] = {"bytes": len(data), "own": round(own, 4)}
            row |= {key: round(value, 4) for key, value in passed.items()}
            keep(args.name, budget, facts, seed, row, arguments)


def keep(
    name: str,
    budget: int,
    facts: dict[str, Any],
    seed: int,
    row: dict[str, Any],
    arguments: Sequence[str],
) -> None:
    """Put one student into the committed figures; those of other code or settings are dropped."""
    figures = load("sent_student")
    target = figures.setdefault(name, {}).setdefault(str(budget), {})
    if {key: target.get(key) for key in facts} != facts:
        target.clear()
    target |= facts
    target.setdefault("runs", {})[str(seed)] = row
    save(RESULTS / "sent_student.json", WHAT, command("sent_student", arguments), figures)
