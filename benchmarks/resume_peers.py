"""Loaders that are killed and resumed: ours and those people train from, all of the same ids."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.loader_peers import streaming
from d3pack.dataset import D3MDataset

IMAGES, BATCH, SHARDS = 144, 4, 12


def pack(folder: Path) -> None:
    """A pack of 144 tiny images, whose pixels tell their numbers."""
    from dataset_packs import tiny_pack
    from tiny_backbones import tiny_dit

    import d3pack

    made = tiny_pack(tiny_dit(folder / "tiny.backbone"), images=IMAGES // 3)
    d3pack.write(made, folder / "tiny.d3m")
    with _images(folder) as dataset:
        rows = torch.stack([image for image, _ in dataset])
    torch.save(rows, folder / "rows.pt")


def _images(folder: Path) -> D3MDataset:
    return D3MDataset(folder / "tiny.d3m", device="cpu", cache_dir=folder / "cache", quiet=True)


class Loader:
    """Opens a loader on this rank; others override what differs."""

    name = "d3pack, loader"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, rank: int, world: int, workers: int) -> Any:
        return _images(self.folder).loader(BATCH, shuffle=True)

    def ids(self, batch: Any) -> list[int]:
        """Return the numbers of the images of a batch."""
        rows = torch.load(self.folder / "rows.pt")
        return [int((rows == image).flatten(1).all(1).nonzero()) for image in batch[0]]

    def write(self) -> None:
        """Write the data, once."""


class Counted:
    """A DataLoader over `batch_order`, whose batches the training loop counts."""

    def __init__(self, dataset: D3MDataset, workers: int) -> None:
        self.order = dataset.batch_order(BATCH, shuffle=True)
        self.loader = DataLoader(dataset, batch_sampler=self.order, num_workers=workers)
        self.load_state_dict = self.order.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        for done, batch in enumerate(self.loader, start=1):
            self.done = done
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_after(self.done)


class BatchOrder(Loader):
    name = "d3pack, DataLoader over batch_order"

    def open(self, rank: int, world: int, workers: int) -> Any:
        return Counted(_images(self.folder), workers)


class StatefulBatchOrder(Loader):
    name = "d3pack, StatefulDataLoader over batch_order"

    def open(self, rank: int, world: int, workers: int) -> Any:
        dataset = _images(self.folder)
        order = dataset.batch_order(BATCH, shuffle=True)
        return StatefulDataLoader(dataset, batch_sampler=order, num_workers=workers)


class Stateful(Loader):
    """As its documentation has it: a sampler of its own on one rank, DistributedSampler on many."""

    name = "torchdata, StatefulDataLoader(D3MDataset)"

    def open(self, rank: int, world: int, workers: int) -> Any:
        dataset: Dataset[Any] = _images(self.folder)
        generator = torch.Generator().manual_seed(0)
        sampler: Any = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
        if world > 1:
            sampler = DistributedSampler(dataset, world, rank)
        return StatefulDataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)


class Ids(Loader):
    """A loader of dictionaries with an id."""

    def ids(self, batch: Any) -> list[int]:
        return [int(number) for number in batch["id"]]


class LitData(Ids):
    name = "litdata"

    def write(self) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.folder / "litdata"), chunk_size=IMAGES // SHARDS)
        for number in range(IMAGES):
            writer.add_item(number, {"id": number})
        writer.done()
        writer.merge(1)

    def open(self, rank: int, world: int, workers: int) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            str(self.folder / "litdata"), shuffle=True, seed=0, drop_last=False
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)


class Mosaic(Ids):
    name = "mosaicml-streaming"

    def write(self) -> None:
        out = str(self.folder / "mds")
        with streaming().MDSWriter(out=out, columns={"id": "int"}, size_limit=400) as writer:
            for number in range(IMAGES):
                writer.write({"id": number})

    def open(self, rank: int, world: int, workers: int) -> Any:
        module = streaming()
        dataset = module.StreamingDataset(
            local=str(self.folder / "mds"), shuffle=True, batch_size=BATCH, num_canonical_nodes=2
        )
        return module.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)


class Hugging(Ids):
    name = "datasets, IterableDataset, shuffled"
    shuffled = True

    def open(self, rank: int, world: int, workers: int) -> Any:
        import datasets
        from datasets.distributed import split_dataset_by_node

        table = datasets.Dataset.from_dict({"id": list(range(IMAGES))})
        stream = table.to_iterable_dataset(num_shards=SHARDS)
        if self.shuffled:
            stream = stream.shuffle(seed=0, buffer_size=16)
        part = split_dataset_by_node(stream, rank, world)
        return StatefulDataLoader(part, BATCH, num_workers=workers)


class Ordered(Hugging):
    """Its best case: without a shuffle buffer, whose content no state holds."""

    name = "datasets, IterableDataset, in order"
    shuffled = False


class WebDataset(Ids):
    """It has no state: StatefulDataLoader skips what was handed out."""

    name = "webdataset"

    def write(self) -> None:
        for shard in range(SHARDS):
            with tarfile.open(self.folder / f"{shard:02d}.tar", "w") as tar:
                for number in range(shard, IMAGES, SHARDS):
                    text = str(number).encode()
                    info = tarfile.TarInfo(f"{number:04d}.id")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))

    def open(self, rank: int, world: int, workers: int) -> Any:
        import webdataset

        urls = [str(path) for path in sorted(self.folder.glob("*.tar"))]
        split = {
            "nodesplitter": webdataset.split_by_node,
            "workersplitter": webdataset.split_by_worker,
        }
        rows = webdataset.WebDataset(urls, shardshuffle=SHARDS, seed=0, empty_check=False, **split)
        rows = rows.shuffle(16, seed=0).map(_id)
        return StatefulDataLoader(rows, BATCH, num_workers=workers)


def _id(row: dict[str, Any]) -> dict[str, int]:
    return {"id": int(row["id"])}


PEERS: Iterable[type[Loader]] = (
    Loader,
    BatchOrder,
    StatefulBatchOrder,
    Stateful,
    LitData,
    Mosaic,
    WebDataset,
    Hugging,
    Ordered,
)
