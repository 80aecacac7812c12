"""Small sources of known pixels in every container."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("golden retriever", "lemon", "school bus")


PER_CLASS = 4


def pixels(c: int, i: int) -> np.ndarray:
    return np.random.default_rng(10 * c + i).integers(0, 256, (9, 11, 3), dtype=np.uint8)


def png(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


def members() -> list[tuple[str, bytes]]:
    return [
        (f"{name.replace(' ', '_')}/{i:03d}.png", png(pixels(c, i)))
        for c, name in enumerate(CLASSES)
        for i in range(PER_CLASS)
    ]


def make_tar(path: Path, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(folder: Path) -> Path:
    folder.mkdir()
    samples = [(c, i) for i in range(PER_CLASS) for c in range(len(CLASSES))]
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for c, i in samples[shard::2]:
                parts = {"cls": str(c).encode(), "png": png(pixels(c, i))}
                for ext, data in parts.items():
                    info = tarfile.TarInfo(f"{i}{c:05d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    return folder


def make_parquet(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    order = [(c, i) for i in range(PER_CLASS) for c in range(len(CLASSES))]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"bytes": png(pixels(c, i)), "path": None} for c, i in order],
        "label": [c for c, _ in order],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path
