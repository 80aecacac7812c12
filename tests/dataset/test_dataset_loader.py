"""D3MLoader: decoded ahead in order, exactly once, with a state; and under torchdata's loader."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_packs import spied
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from d3pack.dataset import D3MDataset
from d3pack.dataset.loader import Background
from d3pack.errors import UsageError
from d3pack.format import Pack

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # in torchdata
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a single core
]


def use(pack: Pack, backbone: Path, **options: Any) -> D3MDataset:
    return D3MDataset(pack, backbone=backbone, **{"quiet": True, **options})


def labels_of(batches: Any) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


def indices_of(batches: Any, expected: Tensor) -> list[int]:
    """The number of each image, by its pixels."""
    found = []
    for images, labels in batches:
        for image, label in zip(images, labels.tolist(), strict=True):
            index = int((expected == image).flatten(1).all(1).nonzero())
            assert label == index // 7
            found.append(index)
    return found


@pytest.mark.parametrize("cache", ["cpu", "disk", None])
@pytest.mark.parametrize("background", [True, False, None])
@pytest.mark.parametrize("batch", [1, 4, 5, 21, 100])
def test_every_epoch_has_every_image_once(
    pack: Pack, backbone: Path, expected: Tensor, cache: Any, batch: int, background: bool | None
) -> None:
    loader = use(pack, backbone, cache=cache).loader(
        batch, shuffle=True, seed=3, background=background
    )
    orders = [indices_of(loader, expected) for _ in range(3)]
    assert [sorted(order) for order in orders] == [list(range(21))] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert len(loader) == -(-21 // batch)


@pytest.mark.parametrize("cache", ["cpu", None])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_first_epoch_decodes_whole_groups(
    pack: Pack, backbone: Path, expected: Tensor, cache: Any, batch: int, background: bool
) -> None:
    dataset = use(pack, backbone, cache=cache)
    asked = spied(dataset)
    order = indices_of(dataset.loader(batch, shuffle=True, background=background), expected)
    assert sum(-(-len(numbers) // 4) for numbers in asked) == 6, "whatever the batch size"
    start = 0
    for numbers in asked:
        assert set(order[start : start + len(numbers)]) <= set(numbers), "in the loader's order"
        start += len(numbers)


def test_loader_decodes_ahead_of_the_training_loop(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone, cache="cpu")
    batches = iter(dataset.loader(4, shuffle=True, background=True))
    next(batches)
    until = time.monotonic() + 20
    while dataset.images._store is None or dataset.images._store.count() < 12:
        assert time.monotonic() < until
        time.sleep(0.01)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "d3pack-prefetch"]


@pytest.mark.parametrize("asked", [None, True, False])
def test_exact_images_on_cuda_are_decoded_in_the_callers_thread(
    pack: Pack, backbone: Path, asked: bool | None
) -> None:
    """Their settings hold for the whole process. Nothing is decoded here."""
    for numerics, expected in (("exact", False), ("fast", asked is not False)):
        dataset = use(pack, backbone, numerics=numerics)
        dataset.device = dataset.images.device = torch.device("cuda")
        assert dataset.loader(4, shuffle=True, background=asked).background is expected


def test_loader_stops_its_thread_when_an_epoch_is_left(pack: Pack, backbone: Path) -> None:
    loader = use(pack, backbone, cache=None).loader(2, shuffle=True, background=True)
    for _ in loader:
        break
    assert not [t for t in threading.enumerate() if t.name == "d3pack-prefetch"]


@pytest.mark.parametrize("background", [True, False])
def test_decoder_error_is_raised_in_the_training_loop(
    pack: Pack, tmp_path: Path, background: bool
) -> None:
    from d3pack.errors import BackboneError

    loader = D3MDataset(pack, backbone=tmp_path, quiet=True).loader(
        4, shuffle=True, background=background
    )
    with pytest.raises(BackboneError):
        next(iter(loader))


def test_background_stops_while_its_queue_is_full() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.zeros(1)

    background = Background(endless(), torch.device("cpu"))
    assert next(iter(background)).shape == (1,)
    background.close()
    assert not [t for t in threading.enumerate() if t.name == "d3pack-prefetch"]


def test_loader_resumes_in_the_middle_of_an_epoch(
    pack: Pack, backbone: Path, expected: Tensor
) -> None:
    whole = indices_of(use(pack, backbone).loader(4, shuffle=True, seed=8), expected)
    first = use(pack, backbone).loader(4, shuffle=True, seed=8)
    head = []
    for batch in first:
        head.append(batch)
        if len(head) == 2:
            state = json.dumps(first.state_dict())
            break
    for batch_size in (4, 3, 9):
        later = use(pack, backbone).loader(batch_size, shuffle=True, seed=0)
        later.load_state_dict(json.loads(state))
        assert indices_of(head, expected) + indices_of(later, expected) == whole
        assert later.epoch == 1
        assert sorted(indices_of(later, expected)) == list(range(21))


def test_fresh_epochs_resume_exactly(pack: Pack, backbone: Path) -> None:
    def run(loader: Any, steps: int) -> list[Tensor]:
        got: list[Tensor] = []
        while len(got) < steps:
            for images, _ in loader:
                got.append(images)
                if len(got) == steps:
                    break
        return got

    loader = use(pack, backbone, fresh=True).loader(6, shuffle=True, seed=1)
    whole = run(loader, 11)
    first = use(pack, backbone, fresh=True).loader(6, shuffle=True, seed=1)
    head = run(first, 7)
    second = use(pack, backbone, fresh=True).loader(6, shuffle=True, seed=1)
    second.load_state_dict(first.state_dict())
    for one, other in zip(whole, head + run(second, 4), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_pack_is_refused(pack: Pack, backbone: Path) -> None:
    from dataset_packs import tiny_pack

    dataset = use(pack, backbone)
    state = dataset.loader(4, shuffle=True).state_dict()
    others = (
        use(tiny_pack(backbone, seed=12), backbone),
        dataset.first(3),
        dataset.select_classes([2, 1, 0]),
    )
    for other in others:
        with pytest.raises(UsageError, match="belongs to pack"):
            other.loader(4, shuffle=True).load_state_dict(state)
        with pytest.raises(UsageError, match="belongs to pack"):
            other.load_state_dict(dataset.state_dict())
    use(pack, backbone).loader(4, shuffle=True).load_state_dict(state)


def test_ranks_divide_an_epoch(pack: Pack, backbone: Path, expected: Tensor) -> None:
    dataset = use(pack, backbone)
    got = [list(dataset.loader(4, shuffle=True, seed=2, rank=rank, world=3)) for rank in range(3)]
    assert len({len(batches) for batches in got}) == 1
    assert sorted(indices_of(itertools.chain(*got), expected)) == list(range(21))
    with pytest.raises(UsageError, match="go together"):
        dataset.loader(4, shuffle=True, rank=1)


def test_drop_last_leaves_out_the_last_images(pack: Pack, backbone: Path, expected: Tensor) -> None:
    loader = use(pack, backbone).loader(8, shuffle=False, drop_last=True)
    assert indices_of(loader, expected) == list(range(16))
    assert len(loader) == 2


@pytest.mark.heavy
def test_loader_in_workers_is_refused(pack: Pack, backbone: Path) -> None:
    loader = use(pack, backbone).loader(4, shuffle=True)
    with pytest.raises(UsageError, match="once a worker"):
        next(iter(DataLoader(loader, batch_size=None, num_workers=1)))
    assert len(list(DataLoader(loader, batch_size=None))) == 6


# Under torchdata's StatefulDataLoader, which keeps the state of dataset and batch sampler


def stateful(pack: Pack, backbone: Path, how: str) -> Any:
    dataset = use(pack, backbone)
    if how == "loader":
        return StatefulDataLoader(dataset.loader(4, shuffle=True, seed=5), batch_size=None)
    workers = 2 if how == "workers" else 0
    context = "fork" if workers else None
    return StatefulDataLoader(
        dataset,
        batch_sampler=dataset.batch_order(4, shuffle=True, seed=5),
        num_workers=workers,
        multiprocessing_context=context,
    )


@pytest.mark.parametrize(
    "how", ["loader", "sampler", pytest.param("workers", marks=pytest.mark.posix)]
)
def test_stateful_data_loader_resumes(
    pack: Pack, backbone: Path, expected: Tensor, how: str
) -> None:
    use(pack, backbone).__getitems__(list(range(21)))
    whole = indices_of(stateful(pack, backbone, how), expected)
    assert sorted(whole) == list(range(21))
    first = stateful(pack, backbone, how)
    head = []
    for batch in first:
        head.append(batch)
        if len(head) == 3:
            break
    state = json.loads(json.dumps(first.state_dict()))
    second = stateful(pack, backbone, how)
    second.load_state_dict(state)
    assert indices_of(head, expected) + indices_of(second, expected) == whole
    assert sorted(indices_of(second, expected)) == list(range(21))


def test_stateful_data_loader_resumes_with_its_own_sampler(
    pack: Pack, backbone: Path, expected: Tensor
) -> None:
    """Where torchdata shuffles, the state of the dataset only checks the pack."""
    dataset = use(pack, backbone)
    first = StatefulDataLoader(dataset, batch_size=4, shuffle=True)
    batches = iter(first)
    head = [next(batches), next(batches)]
    state = json.loads(json.dumps(first.state_dict(), default=lambda t: {"tensor": t.tolist()}))
    assert state["dataset_state"]["pack"] == pack.root
    second = StatefulDataLoader(use(pack, backbone), batch_size=4, shuffle=True)
    second.load_state_dict(first.state_dict())
    assert sorted(indices_of(head + list(second), expected)) == list(range(21))
