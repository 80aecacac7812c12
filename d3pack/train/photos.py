"""Photographs of a source as one array on disk, and the order in which training sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from d3pack.errors import SourceError
from d3pack.sources import Source
from d3pack.system.files import plain_errors, reserve, write_text
from d3pack.train.words import spoken

Pixels = NDArray[np.uint8]
SKIPPED = "skipped.txt"


@dataclass(frozen=True, slots=True)
class Photos:
    """`pixels` (N, S, S, 3), sorted by class; `train` and `held` are row numbers."""

    names: tuple[str, ...]
    pixels: Pixels
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    held: NDArray[np.int64]


def split(labels: NDArray[np.int64], hold_back: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers (train, held): the last `hold_back` of each class are held back.

    At most half of a class; where each has a single image, all do both.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[len(rows) - min(hold_back, len(rows) // 2) :]] = True
    train = np.flatnonzero(~held)
    return train, np.flatnonzero(held) if held.any() else train


@plain_errors()
def load_photos(
    source: Source, cache: Path, size: int, hold_back: int, progress: Callable[[int, int], None]
) -> Photos:
    """Decode the source once into `cache`, square and of side `size`; later calls read it back."""
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
                    hint="mend its files, or remove the class",
                )
        pixels.flush()
        np.save(stored, pixels[: len(labels)])
        part.unlink()
        _list_skipped(source, cache / SKIPPED)
        record = {"names": [spoken(name) for name in source.classes], "labels": labels}
        write_text(index, json.dumps(record))
    found = json.loads(index.read_text())
    labels_array = np.asarray(found["labels"], dtype=np.int64)
    train, held = split(labels_array, hold_back)
    # in memory: random rows from a map of the file starve the trainer as soon as memory is short
    return Photos(tuple(found["names"]), np.load(stored), labels_array, train, held)


def _list_skipped(source: Source, path: Path) -> None:
    """Names of the files that were left out, and why."""
    lines = [f"{skip.class_name}\t{skip.key}\t{skip.reason}\n" for skip in source.skipped]
    # file names may hold bytes that are no UTF-8
    write_text(path, "".join(lines).encode("utf-8", "backslashreplace").decode())


@lru_cache(maxsize=4)
def _epoch(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def batch_rows(rows: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of step number `step`: each row once an epoch, whatever was run before."""
    places = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs = places // rows
    picked = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        picked[here] = _epoch(rows, seed, int(epoch))[places[here] % rows]
    return picked
