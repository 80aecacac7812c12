"""Train the small classifier of 64-pixel images that the benchmark `backbone` measures with.

It is trained once on the real training images (never on the last images of each class, which every
measurement uses), and kept; its pooled features are the space of the Frechet distances.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from d3pack.sources import open_source
from d3pack.train.data import Photos, batch_rows, load_photos

FEATURES = 256


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.skip = nn.Conv2d(inner, outer, 1, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        short = functional.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return functional.relu(y + self.skip(short))


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 2, 1)  # 64 -> 32
        self.blocks = nn.Sequential(
            Block(32, 64, 2),
            Block(64, 64, 1),
            Block(64, 128, 2),
            Block(128, 128, 1),
            Block(128, FEATURES, 2),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.blocks(functional.relu(self.stem(x))).mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def as_input(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 (N, S, S, 3) or float (N, 3, S, S) in [-1, 1] -> the classifier's input."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def classify(classifier: Classifier, images: NDArray[np.uint8] | Tensor) -> tuple[Tensor, Tensor]:
    """(features, logits) of many images."""
    found = []
    for start in range(0, len(images), 256):
        with torch.autocast("cpu", torch.bfloat16):
            f = classifier.features(as_input(images[start : start + 256]))
            found.append((f.float(), classifier.head(f).float()))
    features, logits = zip(*found, strict=True)
    return torch.cat(features), torch.cat(logits)


def augment(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Flip, and a random crop of the reflected border: one draw per image."""
    size = pixels.shape[1]
    wide = np.pad(pixels, ((0, 0), (6, 6), (6, 6), (0, 0)), mode="reflect")
    spots = rng.integers(0, 13, (len(pixels), 2))
    flips = rng.integers(0, 2, len(pixels)) * 2 - 1
    return np.stack(
        [
            image[top : top + size, left : left + size][:, ::flip]
            for image, (top, left), flip in zip(wide, spots, flips, strict=True)
        ]
    )


def channels_last(classifier: Classifier) -> Classifier:
    """Return the classifier with its weights in the layout that is fastest on a CPU."""
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return classifier


def train_classifier(photos: Photos, epochs: int, path: Path, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    classifier = channels_last(Classifier(len(photos.names)))
    batch = 128
    total = epochs * len(photos.train) // batch
    optimizer = torch.optim.SGD(
        classifier.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total, pct_start=0.2)
    started = time.monotonic()
    for step in range(total):
        rows = photos.train[batch_rows(len(photos.train), batch, step, seed)]
        rng = np.random.Generator(np.random.Philox(key=[seed + 9, step]))
        x = as_input(augment(photos.pixels[rows], rng))
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(x)
        loss = functional.cross_entropy(
            logits.float(), torch.from_numpy(photos.labels[rows]), label_smoothing=0.1
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            spent = time.monotonic() - started
            print(
                f"step {step}/{total} loss {loss.item():.3f} {(step + 1) * batch / spent:.0f}/s",
                flush=True,
            )
    classifier.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, part)
    os.replace(part, path)
    return classifier


def load_classifier(path: Path, classes: int) -> Classifier:
    classifier = Classifier(classes)
    classifier.load_state_dict(load_file(path))
    return channels_last(classifier.eval())


def real_photos(source: str, cache: Path) -> Photos:
    """The images as in training: 64 pixels, the last 20 of each class held out."""
    return load_photos(open_source(source), cache, 64, 20, lambda done, total: None)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="real images with class names")
    parser.add_argument("cache", type=Path, help="where decoded photographs are kept")
    parser.add_argument("classifier", type=Path, help="file to write (safetensors)")
    parser.add_argument("--epochs", type=int, default=8)
    found = parser.parse_args(arguments)
    photos = real_photos(found.source, found.cache)
    classifier = train_classifier(photos, found.epochs, found.classifier)
    _, logits = classify(classifier, photos.pixels[photos.held_out])
    labels = torch.from_numpy(photos.labels[photos.held_out])
    ranks = logits.topk(5).indices == labels[:, None]
    print(
        json.dumps(
            {"top1": float(ranks[:, 0].float().mean()), "top5": float(ranks.any(1).float().mean())}
        )
    )
