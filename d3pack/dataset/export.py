"""A D3MDataset as a Hugging Face dataset."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from d3pack.dataset.samples import as_pil
from d3pack.system import require

if TYPE_CHECKING:
    import datasets

    from d3pack.dataset.dataset import D3MDataset

_CHUNK = 256  # images in memory


def to_hf(dataset: D3MDataset) -> datasets.Dataset:
    """Write images and labels, without transforms, to the cache of `datasets`."""
    datasets = require("datasets", "to_hf()")
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=dataset.classes)}
    if dataset.probabilities:
        columns["probabilities"] = datasets.List(datasets.Value("float32"))
    if dataset.weighted:
        columns["weight"] = datasets.Value("float32")
    return datasets.Dataset.from_generator(
        lambda: _rows(dataset),
        features=datasets.Features(columns),
        fingerprint=_fingerprint(dataset, sorted(columns)),
    )


def _fingerprint(dataset: D3MDataset, columns: list[str]) -> str:
    """Return the name by which `datasets` finds rows that it has written before."""
    if dataset.teacher is not None:
        return os.urandom(8).hex()  # two teachers cannot be told apart
    images = dataset.images.identity.key
    text = f"{images} {dataset.identity} {dataset.epoch} {columns}"
    return sha256(text.encode()).hexdigest()[:16]


def _rows(dataset: D3MDataset) -> Iterator[dict[str, Any]]:
    for start in range(0, len(dataset), _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, len(dataset)))
        images = dataset.images.get(dataset.numbers(indices), dataset.epoch)
        labels = dataset.labels(indices, images).cpu()
        hard = dataset.hard_labels(indices)
        weights = dataset.weights(indices).tolist() if dataset.weighted else [None] * len(hard)
        for image, vector, label, weight in zip(images, labels, hard, weights, strict=True):
            png = io.BytesIO()
            as_pil(image).save(png, format="PNG")
            row = {"image": {"bytes": png.getvalue(), "path": None}, "label": label}
            if dataset.probabilities:
                row["probabilities"] = vector.tolist()
            if weight is not None:
                row["weight"] = weight
            yield row
