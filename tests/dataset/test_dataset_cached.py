"""A dataset and its store: filled once, repaired when damaged, chosen and announced."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_packs import flip, spied, tiny_pack
from torch import Tensor
from torch.utils.data import DataLoader

from d3pack.backbones import open_backbone
from d3pack.dataset import (
    D3MDataset,
    StoreIdentity,
    images,
    list_stores,
    store,
    store_in_use,
    verify_store,
)
from d3pack.dataset.disk import open_disk_store
from d3pack.errors import D3MError, NotFoundError, UsageError
from d3pack.format import Pack
from d3pack.system import StatusLine


def use(pack: Pack, backbone: Path, **options: Any) -> D3MDataset:
    return D3MDataset(pack, backbone=backbone, **{"quiet": True, **options})


def test_second_run_decodes_nothing(
    pack: Pack, backbone: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = use(pack, backbone)
    assert torch.equal(torch.stack([image for image, _ in first]), expected)
    second = use(pack, backbone)
    monkeypatch.setattr("d3pack.dataset.images.Decoder", None)
    assert torch.equal(torch.stack([image for image, _ in second]), expected)
    part = use(pack, backbone).select_classes(["penguin"])
    assert torch.equal(part[1][0], expected[8]), "a part shares the store"


def test_single_images_decode_each_group_once(pack: Pack, backbone: Path) -> None:
    """21 images in groups of 4 are 6 forwards, whatever is asked for first."""
    for ask in ([0], [20], [3, 9], list(range(21))):
        dataset = use(pack, backbone, cache="cpu")
        asked = spied(dataset)
        dataset.__getitems__(ask)
        for index in range(21):
            dataset[index]
        assert sum(-(-len(numbers) // 4) for numbers in asked) == 6, ask
        assert sorted(number for numbers in asked for number in numbers) == list(range(21))


def test_damaged_image_is_decoded_again(pack: Pack, backbone: Path, expected: Tensor) -> None:
    first = use(pack, backbone)
    list(first)
    first.close()
    (entry,) = list_stores(Path(os.environ["D3PACK_HOME"]))
    flip(entry.path / "pixels", 13 * first.images.identity.row + 77)
    second = use(pack, backbone)
    with pytest.warns(RuntimeWarning, match="checksum"):
        assert torch.equal(torch.stack([image for image, _ in second]), expected)
    assert verify_store(entry) == []


@pytest.mark.heavy
@pytest.mark.parametrize("after", [0, 1, 9, 30])
def test_full_disk_is_one_warning_and_training_continues(
    pack: Pack, backbone: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    writes = 0
    real = os.pwrite

    def full(handle: int, data: Any, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    dataset = use(pack, backbone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            order = torch.randperm(21).tolist()
            for indices in (order[:9], order[9:]):
                rows = dataset.__getitems__(indices)
                assert torch.equal(torch.stack([image for image, _ in rows]), expected[indices])
            images = torch.cat([images for images, _ in dataset.loader(5, shuffle=False)])
            assert torch.equal(images, expected)
    (warning,) = caught
    assert "No space left on device" in str(warning.message)


def test_unwritable_cache_dir_is_replaced_by_memory(
    pack: Pack, backbone: Path, expected: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "file"
    place.touch()
    with pytest.warns(RuntimeWarning, match="no store on disk"):
        assert torch.equal(use(pack, backbone, cache="disk", cache_dir=place)[0][0], expected[0])
    dataset = use(pack, backbone, cache_dir=place, quiet=False)
    assert torch.equal(dataset[0][0], expected[0])
    assert "cache=auto: host memory" in capfd.readouterr().err


def test_store_that_does_not_fit_is_refused_or_left_out(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"need 258 kB on disk, but .* take 1 kB;"):
        use(pack, backbone, cache="disk", cache_size=1000)[0]
    monkeypatch.setattr(store, "free_memory", lambda: 1000.0)
    use(pack, backbone, cache_size=1000, quiet=False)[0]
    assert "no store: 258 kB fit nowhere" in capfd.readouterr().err


def test_auto_cache_is_announced_once_where_images_are_decoded(
    pack: Pack, backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = use(pack, backbone, quiet=False)
    list(dataset)
    list(dataset.loader(4, shuffle=True))
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "cache=auto: disk" in line]) == 1
    list(use(pack, backbone, quiet=False))  # all images are there
    assert capfd.readouterr().err == ""
    use(pack, backbone, cache="cpu", quiet=False)[0]
    assert capfd.readouterr().err == ""


def test_a_store_is_announced_once_for_all_datasets_of_a_process(
    pack: Pack, backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for part in ([0], [1, 2]):
        list(use(pack, backbone, quiet=False).select_classes(part))
    assert capfd.readouterr().err.count("cache=auto: disk") == 1


def test_free_memory_is_plausible() -> None:
    assert 1e8 < store.free_memory() < 1e15


def test_close_releases_the_store(pack: Pack, backbone: Path, expected: Tensor) -> None:
    dataset = use(pack, backbone)
    dataset[0]
    (entry,) = list_stores(Path(os.environ["D3PACK_HOME"]))
    assert store_in_use(entry.path)
    dataset.close()
    assert not store_in_use(entry.path)
    assert torch.equal(dataset[0][0], expected[0]), "a closed dataset is opened again"


class Impatient(StatusLine):
    """Shows a line for every group, however short the work."""

    def add(self, number: int, seconds: float, done: int | None, total: int | None = None) -> None:
        super().add(number, seconds + 2.0, done, total)


def test_progress_is_printed_unless_quiet(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr(images, "StatusLine", Impatient)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one group at a time: as many lines as groups
    try:
        list(use(pack, backbone, quiet=False, cache="cpu").loader(5, shuffle=True))
    finally:
        torch.set_num_threads(threads)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all("of 21 images" in line and "images/s" in line for line in lines)
    assert "left" in lines[0]
    assert "decoded 21 of 21" in lines[-1]
    assert "left" not in lines[-1]
    list(use(pack, backbone, quiet=True, cache="cpu").loader(5, shuffle=True))
    assert capfd.readouterr().err == ""


def test_a_long_group_says_how_far_it_is(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr("d3pack.system.progress._LONG_PIECE", 0.0)
    use(pack, backbone, quiet=False, cache="cpu").__getitems__(list(range(10)))
    lines = capfd.readouterr().err.splitlines()
    assert any("of the next 12 images" in line for line in lines), lines
    use(pack, backbone, quiet=True, cache="cpu").__getitems__(list(range(10)))
    assert capfd.readouterr().err == ""


def test_progress_of_a_selection_counts_its_images(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr(images, "StatusLine", Impatient)
    dataset = use(pack, backbone, quiet=False, cache="cpu")
    part = dataset.select_classes([2, 0]).first(3)
    list(part)
    assert "decoded 6 of 6 images" in capfd.readouterr().err.splitlines()[-1]
    list(dataset)
    assert "decoded 21 of 21 images" in capfd.readouterr().err.splitlines()[-1]


def test_progress_without_a_store_has_no_time_left(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr(images, "StatusLine", Impatient)
    list(use(pack, backbone, quiet=False, cache=None).loader(5, shuffle=True, background=False))
    lines = capfd.readouterr().err.splitlines()
    assert lines
    pattern = r"d3pack: decoded \d+ images, \d+\.\d images/s"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


@pytest.mark.heavy
@pytest.mark.parametrize("cache", ["cpu", "disk", None])
def test_memory_is_constant_over_epochs(pack: Pack, backbone: Path, cache: Any) -> None:
    loader = use(pack, backbone, cache=cache).loader(5, shuffle=True)
    sizes = []
    for _ in range(10):
        assert sum(len(labels) for _, labels in loader) == 21
        sizes.append(resident())
    assert sizes[-1] - sizes[2] < 4 << 20, sizes


class Counting:
    """A decoder without a model: the pixels of an image tell its number."""

    def images(self, numbers: Any, epoch: int = 0) -> Tensor:
        rows = torch.from_numpy(numbers)[:, None] >> torch.tensor([0, 8, 16])
        return (rows & 255).to(torch.uint8)[:, :, None, None]

    def close(self) -> None: ...


@pytest.mark.slow
def test_as_many_images_as_imagenet_are_handed_out_quickly_in_little_memory(
    backbone: Path, tmp_path: Path
) -> None:
    """All are decoded, kept on disk and handed out once; then read in another order."""
    dataset = use(tiny_pack(backbone, classes=7, images=183_024, group=256), backbone)
    identity = StoreIdentity("r", "exact", "cpu", "t", len(dataset), (3, 1, 1))
    dataset.images._store = open_disk_store(tmp_path, identity, 1 << 30)
    dataset.images._decoder = Counting()  # type: ignore[assignment]
    loader = dataset.loader(256, shuffle=True)
    before, most = resident(), 0
    for epoch in range(2):
        seen = np.zeros(len(dataset), np.int64)
        started = time.process_time()
        for step, (rows, labels) in enumerate(loader):
            numbers = (rows[:, :, 0, 0].long() << torch.tensor([0, 8, 16])).sum(1)
            assert torch.equal(numbers // 183_024, labels)
            seen[numbers.numpy()] += 1
            if step % 100 == 0:
                most = max(most, resident() - before)
        seconds = time.process_time() - started
        assert (seen == 1).all()
        rate = len(dataset) / seconds
        print(f"epoch {epoch}: {rate:,.0f} images/s, {most / 2**20:.0f} MB more")
        assert rate > (20_000 if epoch else 10_000), "the first epoch writes, too"
    assert most < 200 << 20


def resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_data_loader_reads_a_store_that_another_dataset_filled(
    pack: Pack, backbone: Path, expected: Tensor
) -> None:
    use(pack, backbone).__getitems__(list(range(10)))
    images = torch.cat([images for images, _ in DataLoader(use(pack, backbone), 6)])
    assert torch.equal(images, expected)


def test_fast_stores_differ_by_their_switches(pack: Pack, backbone: Path) -> None:
    """A decoder on an open backbone turns no switch on, so its images differ."""
    shared = open_backbone(pack.recipe.backbone, path=backbone)
    own = use(pack, backbone, numerics="fast").images.identity
    other = D3MDataset(pack, backbone=shared, numerics="fast", quiet=True).images.identity
    assert own.numerics == "fast:bf16,channels_last,fused_attention"
    assert other.numerics == "fast:"
    assert own.key != other.key
    assert use(pack, backbone).images.identity.numerics == "exact"


def test_existing_store_is_used_on_a_full_disk(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = use(pack, backbone)
    list(first)
    first.close()
    usage = shutil.disk_usage("/")._replace(free=100_000)  # the store takes 258 kB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("d3pack.dataset.images.Decoder", None)
    assert len(list(use(pack, backbone))) == 21


def test_wrong_numerics_or_backbone_leave_no_store(pack: Pack, backbone: Path) -> None:
    with pytest.raises(UsageError, match="invalid numerics 'turbo': expected exact or fast"):
        use(pack, backbone, numerics="turbo")
    with pytest.raises(NotFoundError, match="no backbone directory nothere"):
        use(pack, Path("nothere"))
    with pytest.raises(D3MError):
        use(pack, Path(__file__).parent)[0]
    assert list_stores(Path(os.environ["D3PACK_HOME"])) == []


def test_relative_cache_dir_is_resolved_at_construction(
    pack: Pack, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = use(pack, backbone, cache_dir="here", cache="disk")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    dataset[0]
    assert len(list_stores(tmp_path / "here")) == 1


@pytest.mark.parametrize("wrong", [1.7, True, None])
def test_class_that_is_not_a_name_or_number_is_refused(
    pack: Pack, backbone: Path, wrong: Any
) -> None:
    with pytest.raises(UsageError, match=r"invalid class .*: expected a name or a number"):
        use(pack, backbone).select_classes([wrong])


def test_classes_as_one_string_are_refused(pack: Pack, backbone: Path) -> None:
    with pytest.raises(UsageError, match=r"write \['penguin'\]"):
        use(pack, backbone, classes="penguin")


def test_state_without_an_epoch_is_refused(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone)
    state = dataset.state_dict()
    del state["epoch"]
    with pytest.raises(UsageError, match="invalid dataset state"):
        dataset.load_state_dict(state)


def test_address_without_a_scheme_names_the_right_form(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="hf://datasets/org/name"):
        D3MDataset("org/x/a.d3m")
