"""Training data: photographs as one array on disk, their latents, and the order of batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from d3pack.errors import SourceError
from d3pack.sources import Source
from d3pack.system import disk_full_as_error, mixed_precision, reserve, write_text, writing

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

Pixels = NDArray[np.uint8]
Encoder = Callable[[Pixels], Tensor]  # (N, S, S, 3) -> latents
SKIPPED = "skipped.txt"


def spoken(name: str) -> str:
    """Return a class name as it is spoken: `king_penguin` -> `king penguin`."""
    return " ".join(name.replace("_", " ").split()).lower()


@dataclass(frozen=True, slots=True)
class Photos:
    """Images of all classes at one size.

    Attributes:
        pixels: (N, S, S, 3), sorted by class.
        train: rows to train on.
        held_out: rows that only measure.
    """

    names: tuple[str, ...]
    pixels: Pixels
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(labels: NDArray[np.int64], hold_back: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the rows held out.

    The last `hold_back` rows of each class are held out, at most half of the class. Where every
    class has a single image, all rows do both.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[len(rows) - min(hold_back, len(rows) // 2) :]] = True
    train = np.flatnonzero(~held)
    return train, np.flatnonzero(held) if held.any() else train


@disk_full_as_error()
def load_photos(
    source: Source, cache: Path, size: int, hold_back: int, progress: Callable[[int, int], None]
) -> Photos:
    """Decode the source once into `cache`, as squares of side `size`; later calls read it back."""
    index, stored = cache / "photos.json", cache / "photos.npy"
    if not index.exists():
        cache.mkdir(parents=True, exist_ok=True)
        total = sum(source.counts)
        part = cache / "photos.part.npy"
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (total, size, size, 3))
        reserve(part, pixels.offset)
        labels: list[int] = []
        for label, name in enumerate(source.classes):
            before = len(labels)
            for _, image in source.iter_class(label):
                pixels[len(labels)] = np.asarray(ImageOps.fit(image, (size, size)))
                labels.append(label)
                progress(len(labels), total)
            if len(labels) == before:
                raise SourceError(
                    f"no image of class {name!r} can be read",
                    hint="repair its files, or remove the class",
                )
        pixels.flush()
        np.save(stored, pixels[: len(labels)])
        part.unlink()
        write_text(cache / SKIPPED, source.skipped_lines())
        record = {"names": [spoken(name) for name in source.classes], "labels": labels}
        write_text(index, json.dumps(record))
    record = json.loads(index.read_text())
    labels_array = np.asarray(record["labels"], dtype=np.int64)
    train, held = split(labels_array, hold_back)
    # read into memory: random rows of a mapped file are slow as soon as memory is short
    return Photos(tuple(record["names"]), np.load(stored), labels_array, train, held)


@lru_cache(maxsize=4)
def _epoch(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def batch_rows(rows: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of one step, a function of the step alone: each row once an epoch."""
    places = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs = places // rows
    picked = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        picked[in_epoch] = _epoch(rows, seed, int(epoch))[places[in_epoch] % rows]
    return picked


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents of unit variance, (N, C, h, w): row i shows class `labels[i]`, perhaps a collage."""

    values: NDArray[np.float16]
    labels: NDArray[np.int64]
    collage: NDArray[np.bool_]


@torch.no_grad()
def encode_pixels(model: AutoencoderTiny, pixels: NDArray[np.uint8]) -> Tensor:
    device = next(model.parameters()).device
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    with mixed_precision(device):
        raw = model.encoder(x).float()
    scaled: Tensor = raw * model.config.scaling_factor
    return scaled


def make_collage(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four images (4, S, S, 3) as one image: each halved by averaging, two by two."""
    count, size, _, _ = tiles.shape
    half = size // 2
    small = tiles.reshape(count, half, 2, half, 2, 3).mean((2, 4)).round().astype(np.uint8)
    return np.block([[[small[0]], [small[1]]], [[small[2]], [small[3]]]])


def collages(photos: Photos, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return `count` random collages of one class each, and their labels."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 3]))
    by_class = [photos.train[photos.labels[photos.train] == c] for c in range(len(photos.names))]
    labels = np.arange(count, dtype=np.int64) % len(photos.names)
    images = np.zeros((count, *photos.pixels.shape[1:]), np.uint8)
    for place, label in enumerate(labels):
        images[place] = make_collage(photos.pixels[rng.choice(by_class[label], 4)])
    return images, labels


def _pieces(photos: Photos, extra: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for flip in (1, -1):
        for start in range(0, len(photos.train), 256):
            rows = photos.train[start : start + 256]
            yield np.ascontiguousarray(photos.pixels[rows][:, :, ::flip])
    for start in range(0, len(extra), 256):
        yield extra[start : start + 256]


def held_out_latents(photos: Photos, encode: Encoder) -> Latents:
    """Return the latents of the images that only measure."""
    parts = np.array_split(photos.held_out, max(1, len(photos.held_out) // 256))
    values = np.concatenate([encode(photos.pixels[rows]).half().cpu().numpy() for rows in parts])
    return Latents(values, photos.labels[photos.held_out], np.zeros(len(values), np.bool_))


def cached_latents(
    photos: Photos,
    encode: Encoder,
    cache: Path,
    collage_share: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> Latents:
    """Return latents of both flips of every training image, then of collages.

    They are encoded on the first call and kept in `cache`.
    """
    path, index = cache / "latents.npy", cache / "latents.json"
    singles = len(photos.train)
    if not index.exists():
        extra, extra_labels = collages(photos, int(2 * singles * collage_share), seed)
        total, done = 2 * singles + len(extra), 0
        parts: list[NDArray[np.float16]] = []
        for pixels in _pieces(photos, extra):
            parts.append(encode(pixels).half().cpu().numpy())
            done += len(pixels)
            progress(done, total)
        single_labels = photos.labels[photos.train]
        labels = np.concatenate([single_labels, single_labels, extra_labels])
        with writing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
        write_text(index, json.dumps({"labels": labels.tolist(), "singles": 2 * singles}))
    record = json.loads(index.read_text())
    labels = np.asarray(record["labels"], np.int64)
    return Latents(np.load(path), labels, np.arange(len(labels)) >= record["singles"])


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
