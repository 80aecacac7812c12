"""DataLoader workers: forked and spawned, sharing the store on disk; refused on CUDA."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from d3pack.dataset import D3MDataset, TransformError, list_stores
from d3pack.errors import UsageError
from d3pack.format import Pack

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a single core
]


def use(pack: Pack, backbone: Path, **options: Any) -> D3MDataset:
    return D3MDataset(pack, backbone=backbone, **{"quiet": True, **options})


def loader(dataset: D3MDataset, how: str = "fork", **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=5,
        num_workers=options.pop("num_workers", 2),
        multiprocessing_context=how,
        **options,
    )


@pytest.mark.parametrize("cache", ["auto", "cpu", None])
def test_forked_workers_give_the_same_images(
    pack: Pack, backbone: Path, expected: Tensor, cache: Any
) -> None:
    dataset = use(pack, backbone, cache=cache)
    dataset[0]  # the parent has a decoder open when it forks
    for _ in range(2):
        images = torch.cat([images for images, _ in loader(dataset)])
        assert torch.equal(images, expected)
    assert torch.equal(dataset[20][0], expected[20])


def test_spawned_workers_give_the_same_images(pack: Pack, backbone: Path, expected: Tensor) -> None:
    batches = loader(use(pack, backbone), "spawn", num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


@pytest.mark.parametrize("cache", ["auto", "cpu"])
def test_workers_share_the_store_on_disk(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    """Other workers read what the workers of one epoch decoded."""
    list(loader(use(pack, backbone, cache=cache)))
    (entry,) = list_stores(Path(os.environ["D3PACK_HOME"]))
    assert entry.decoded == 21
    monkeypatch.setattr("d3pack.dataset.images.Decoder", None)  # forked workers inherit this
    assert len(list(loader(use(pack, backbone, cache=cache)))) == 5


def test_fork_during_a_decode_in_a_thread_gives_the_same_images(
    pack: Pack, backbone: Path, expected: Tensor
) -> None:
    dataset = use(pack, backbone, cache=None)
    ahead = iter(dataset.loader(2, shuffle=True, background=True))
    next(ahead)  # its thread may hold the lock of the decoder now
    images = torch.cat([images for images, _ in loader(dataset)])
    assert torch.equal(images, expected)
    ahead.close()  # type: ignore[attr-defined]


def test_persistent_workers_see_a_fresh_epoch(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone, fresh=True)
    batches = loader(dataset, persistent_workers=True)
    single = use(pack, backbone, fresh=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        single.set_epoch(epoch)
        images = torch.cat([images for images, _ in batches])
        assert torch.equal(images, torch.stack([image for image, _ in single]))


def test_transform_error_in_a_worker_names_the_image(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone, transform=_picky)
    with pytest.raises(TransformError, match=r"image 0 \(class 'goldfish'\)"):
        list(loader(dataset))


def _picky(image: Tensor) -> Tensor:
    raise ValueError("no good")


def test_cuda_in_workers_is_refused_with_alternatives(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone)
    dataset.device = dataset.images.device = torch.device("cuda")  # refused before it is touched
    with pytest.raises(UsageError, match=r"ds\.loader\(batch_size=\.\.\.\) or num_workers=0"):
        list(loader(dataset))


def test_workers_announce_the_cache_once(
    pack: Pack, backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    list(loader(use(pack, backbone, quiet=False)))
    assert capfd.readouterr().err.count("cache=auto: disk") == 1
    list(loader(use(pack, backbone)))
    assert capfd.readouterr().err == ""


def test_workers_without_a_store_announce_it(
    pack: Pack, backbone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "file"
    place.touch()
    list(loader(use(pack, backbone, cache_dir=place)))
    assert capfd.readouterr().err.count("cache=auto: no store") == 1


@pytest.mark.posix
def test_dataset_works_in_a_forked_process(pack: Pack, backbone: Path, expected: Tensor) -> None:
    dataset = use(pack, backbone)
    dataset[0]
    context = multiprocessing.get_context("fork")
    done: Any = context.Queue()
    child = context.Process(target=_ask, args=(dataset, done))
    child.start()
    assert done.get(timeout=60) == expected[9].float().sum().item()
    child.join()
    assert torch.equal(dataset[9][0], expected[9])


def _ask(dataset: D3MDataset, done: Any) -> None:
    torch.set_num_threads(1)
    done.put(dataset[9][0].float().sum().item())
