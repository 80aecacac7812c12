"""Latents of all training photographs and of collages, computed once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from d3pack.system.files import plain_errors, write_text
from d3pack.train.photos import Photos


@dataclass(frozen=True, slots=True)
class Latents:
    """`values` (N, C, h, w) f16 of unit variance; row i shows class `labels[i]`, or a collage."""

    values: NDArray[np.float16]
    labels: NDArray[np.int64]
    collage: NDArray[np.bool_]


@torch.no_grad()
def encode_pixels(model: AutoencoderTiny, pixels: NDArray[np.uint8]) -> Tensor:
    device = next(model.parameters()).device
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        raw = model.encoder(x).float()
    scaled: Tensor = raw * model.config.scaling_factor
    return scaled


def make_collage(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four images (4, S, S, 3) as one of the same size: each halved by averaging, two by two."""
    count, size, _, _ = tiles.shape
    half = size // 2
    small = tiles.reshape(count, half, 2, half, 2, 3).mean((2, 4)).round().astype(np.uint8)
    return np.block([[[small[0]], [small[1]]], [[small[2]], [small[3]]]])


def collages(photos: Photos, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` random collages of one class each, and their labels."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 3]))
    by_class = [photos.train[photos.labels[photos.train] == c] for c in range(len(photos.names))]
    labels = np.arange(count, dtype=np.int64) % len(photos.names)
    made = np.zeros((count, *photos.pixels.shape[1:]), np.uint8)
    for place, label in enumerate(labels):
        made[place] = make_collage(photos.pixels[rng.choice(by_class[label], 4)])
    return made, labels


def _pieces(photos: Photos, extra: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for flip in (1, -1):
        for start in range(0, len(photos.train), 256):
            rows = photos.train[start : start + 256]
            yield np.ascontiguousarray(photos.pixels[rows][:, :, ::flip])
    for start in range(0, len(extra), 256):
        yield extra[start : start + 256]


def load_latents(
    photos: Photos,
    model: AutoencoderTiny,
    cache: Path,
    collage_share: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> Latents:
    """Both flips of every training photograph, then collages; encoded on the first call."""

    def encode(pixels: NDArray[np.uint8]) -> Tensor:
        return encode_pixels(model.eval().to(memory_format=torch.channels_last), pixels)

    return keep_latents(photos, encode, cache, collage_share, seed, progress)


@plain_errors()
def keep_latents(
    photos: Photos,
    encode: Callable[[NDArray[np.uint8]], Tensor],
    cache: Path,
    collage_share: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> Latents:
    """The same with any encoder of (N, S, S, 3) pixels."""
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
        part = cache / "latents.part.npy"
        np.save(part, np.concatenate(parts))
        os.replace(part, path)
        write_text(index, json.dumps({"labels": labels.tolist(), "singles": 2 * singles}))
    found = json.loads(index.read_text())
    labels = np.asarray(found["labels"], np.int64)
    return Latents(np.load(path), labels, np.arange(len(labels)) >= found["singles"])
