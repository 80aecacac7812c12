"""The same images as the formats people train from: files, MDS, WebDataset, a tensor in memory."""

from __future__ import annotations

import io
import random
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batches = Iterator[tuple[Tensor, Tensor]]
QUALITY = 95
SHARD = 1000  # images in a shard, for those that have shards


class Files(Dataset[tuple[Tensor, int]]):
    """ImageFolder with the usual loader: open, decode with PIL, to a tensor."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.rglob("*.jpg"))
        self.labels = [int(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB"))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.labels[index]


def jpeg(image: Tensor) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="JPEG", quality=QUALITY)
    return data.getvalue()


def write_files(root: Path, images: Tensor, labels: list[int]) -> None:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:06d}.jpg").write_bytes(jpeg(image))


def files(root: Path, batch: int, workers: int) -> Callable[[], Batches]:
    loader = DataLoader(
        Files(root), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: iter(loader)


def write_shards(root: Path, images: Tensor, labels: list[int], kind: str) -> None:
    """WebDataset's tar files, in random order as its users are told to write them."""
    root.mkdir(parents=True)
    order = list(range(len(images)))
    random.Random(0).shuffle(order)
    for start in range(0, len(order), SHARD):
        with tarfile.open(root / f"{start // SHARD:05d}.tar", "w") as tar:
            for number in order[start : start + SHARD]:
                image = images[number]
                if kind == "jpg":
                    data = jpeg(image)
                else:
                    npy = io.BytesIO()
                    np.save(npy, image.numpy())
                    data = npy.getvalue()
                for end, content in ((kind, data), ("cls", str(labels[number]).encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def webdataset(root: Path, batch: int, workers: int, kind: str) -> Callable[[], Batches]:
    import webdataset as wds

    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    pipeline = (
        wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode("torchrgb8" if kind == "jpg" else "rgb8")
        .to_tuple(kind, "cls")
        .map_tuple(as_tensor, int)
        .batched(batch, collation_fn=torch.utils.data.default_collate)
    )
    loader = wds.WebLoader(
        pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: iter(loader)


def as_tensor(image: Any) -> Tensor:
    return image if isinstance(image, Tensor) else torch.from_numpy(image)


def streaming() -> Any:
    """`mosaicml-streaming`, or None where it is not installed."""
    if find_spec("streaming") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            # A torchvision built for another torch lacks two operators; streaming needs neither.
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            streaming.library = library  # type: ignore[attr-defined]  # kept alive
        import streaming as module
    return module


def write_mds(root: Path, images: Tensor, labels: list[int], kind: str) -> None:
    column = "jpeg" if kind == "jpg" else f"ndarray:uint8:{','.join(map(str, images.shape[1:]))}"
    with streaming().MDSWriter(
        out=str(root), columns={"image": column, "label": "int"}, size_limit=1 << 26
    ) as writer:
        for image, label in zip(images, labels, strict=True):
            if kind == "jpg":
                content: Any = Image.open(io.BytesIO(jpeg(image)))
            else:
                content = image.numpy()
            writer.write({"image": content, "label": label})


def mds(root: Path, batch: int, workers: int, kind: str) -> Callable[[], Batches]:
    dataset = streaming().StreamingDataset(
        local=str(root), shuffle=True, batch_size=batch, num_canonical_nodes=1
    )
    loader = DataLoader(
        dataset,
        batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_mds,
    )
    return lambda: iter(loader)


def collate_mds(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    images = []
    for row in rows:
        pixels = row["image"]
        if isinstance(pixels, Image.Image):
            pixels = np.asarray(pixels.convert("RGB")).transpose(2, 0, 1).copy()
        images.append(torch.from_numpy(pixels))
    return torch.stack(images), torch.tensor([int(row["label"]) for row in rows])


def tensor(images: Tensor, labels: list[int], batch: int, how: str) -> Callable[[], Batches]:
    """What a careful user writes who holds the whole set as one tensor."""
    targets = torch.tensor(labels)

    def batches() -> Batches:
        for index in torch.randperm(len(images)).split(batch):
            if how == "index":
                yield images[index], targets[index]
            else:
                yield images.index_select(0, index), targets.index_select(0, index)

    return batches


class Rows(Dataset[tuple[Tensor, int]]):
    """A tensor as a dataset: nothing to open, nothing to decode, a whole batch at once."""

    def __init__(self, images: Tensor, labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        rows = self.images.index_select(0, torch.tensor(indices))
        return [(row, self.labels[index]) for row, index in zip(rows, indices, strict=True)]


def rows(images: Tensor, labels: list[int], batch: int, workers: int) -> Callable[[], Batches]:
    """What DataLoader itself costs: its workers have next to nothing to do."""
    loader = DataLoader(
        Rows(images, labels),
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)
