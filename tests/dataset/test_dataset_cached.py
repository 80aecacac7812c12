"""The stores under a dataset: filled once, redone when damaged, chosen and told."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_packs import flip, spied
from torch import Tensor
from torch.utils.data import DataLoader

from d3pack.backbones import open_backbone
from d3pack.dataset import D3MDataset, choice, disk, shelf
from d3pack.dataset.progress import Progress
from d3pack.errors import D3MError, NotFoundError, UsageError
from d3pack.format.pack import Pack


def use(pack: Pack, backbone: Path, **options: Any) -> D3MDataset:
    return D3MDataset(pack, backbone=backbone, **{"quiet": True, **options})


def test_a_second_run_decodes_nothing(
    pack: Pack, backbone: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = use(pack, backbone)
    assert torch.equal(torch.stack([image for image, _ in first]), expected)
    second = use(pack, backbone)
    monkeypatch.setattr("d3pack.dataset.images.Decoder", None)
    assert torch.equal(torch.stack([image for image, _ in second]), expected)
    part = use(pack, backbone).select_classes(["penguin"])
    assert torch.equal(part[1][0], expected[8]), "a part lives in the same store"


def test_no_slot_of_a_group_is_wasted(pack: Pack, backbone: Path) -> None:
    """21 images in groups of 4 are 6 forwards, whatever is asked for first."""
    for ask in ([0], [20], [3, 9], list(range(21))):
        dataset = use(pack, backbone, cache="cpu")
        asked = spied(dataset)
        dataset.__getitems__(ask)
        for index in range(21):
            dataset[index]
        assert sum(-(-len(numbers) // 4) for numbers in asked) == 6, ask
        assert sorted(number for numbers in asked for number in numbers) == list(range(21))


def test_a_flipped_byte_in_use_is_redone(pack: Pack, backbone: Path, expected: Tensor) -> None:
    first = use(pack, backbone)
    list(first)
    first.close()
    (entry,) = shelf.entries(Path(os.environ["D3PACK_HOME"]))
    flip(entry.path / "pixels", 13 * entry.identity.row + 77)
    second = use(pack, backbone)
    with pytest.warns(RuntimeWarning, match="checksum"):
        assert torch.equal(torch.stack([image for image, _ in second]), expected)
    assert shelf.verify(entry) == []


@pytest.mark.parametrize("after", [0, 1, 9, 30])
def test_a_full_disk_is_one_warning_and_the_training_goes_on(
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

    monkeypatch.setattr(disk.os, "pwrite", full)
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


def test_a_folder_that_cannot_be_written(
    pack: Pack, backbone: Path, expected: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "file"
    place.touch()
    with pytest.warns(RuntimeWarning, match="no store on disk"):
        assert torch.equal(use(pack, backbone, cache="disk", cache_dir=place)[0][0], expected[0])
    dataset = use(pack, backbone, cache_dir=place, quiet=False)
    assert torch.equal(dataset[0][0], expected[0])
    assert "cache=auto: host memory" in capfd.readouterr().err


def test_a_store_that_does_not_fit(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"need 258 kB on disk, but .* take 1 kB;"):
        use(pack, backbone, cache="disk", cache_size=1000)[0]
    monkeypatch.setattr(choice, "host_memory", lambda: 1000.0)
    use(pack, backbone, cache_size=1000, quiet=False)[0]
    assert "no store: 258 kB fit nowhere" in capfd.readouterr().err


def test_auto_says_once_what_it_chose(
    pack: Pack, backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = use(pack, backbone, quiet=False)
    list(dataset)
    list(dataset.loader(4))
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "cache=auto: disk" in line]) == 1
    use(pack, backbone, cache="cpu", quiet=False)[0]
    assert capfd.readouterr().err == ""


def test_host_memory_is_known() -> None:
    assert 1e8 < choice.host_memory() < 1e15


def test_close_lets_others_evict(pack: Pack, backbone: Path, expected: Tensor) -> None:
    dataset = use(pack, backbone)
    dataset[0]
    (entry,) = shelf.entries(Path(os.environ["D3PACK_HOME"]))
    assert shelf.in_use(entry.path)
    dataset.close()
    assert not shelf.in_use(entry.path)
    assert torch.equal(dataset[0][0], expected[0]), "a closed dataset opens again"


def test_progress_is_said_unless_quiet(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.dataset.progress._QUIET_START", 0.0)
    monkeypatch.setattr("d3pack.dataset.progress._EVERY_LOG", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one group at a time: as many lines as groups
    try:
        list(use(pack, backbone, quiet=False, cache="cpu").loader(5))
    finally:
        torch.set_num_threads(threads)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all("of 21 images" in line and "images/s" in line for line in lines)
    assert "left" in lines[0]
    assert "decoded 21 of 21" in lines[-1]
    assert "left" not in lines[-1]
    list(use(pack, backbone, quiet=True, cache="cpu").loader(5))
    assert capfd.readouterr().err == ""


def test_a_store_that_forgets_has_a_rate_and_no_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.dataset.progress._EVERY_LOG", 0.0)
    progress = Progress(21, quiet=False)
    for _ in range(3):
        progress.add(16, 4.0, None)
    assert capfd.readouterr().err.splitlines() == [
        f"d3pack: decoded {count} images, 4.0 images/s" for count in (16, 32, 48)
    ]


def test_a_terminal_gets_one_moving_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(100, quiet=False)
    progress.add(10, 1.0, 10)
    assert terminal.getvalue() == "", "nothing is said about two seconds of work"
    progress.add(30, 3.0, 40)
    progress.add(60, 6.0, 100)
    lines = terminal.getvalue().split("\r\x1b[K")[1:]
    assert lines == [
        "d3pack: decoded 40 of 100 images, 10.0 images/s, 0:06 left",
        "d3pack: decoded 100 of 100 images, 10.0 images/s\n",
    ]


@pytest.mark.parametrize("cache", ["cpu", "disk", None])
def test_memory_is_flat_over_epochs(pack: Pack, backbone: Path, cache: Any) -> None:
    loader = use(pack, backbone, cache=cache).loader(5)
    sizes = []
    for _ in range(10):
        assert sum(len(labels) for _, labels in loader) == 21
        sizes.append(resident())
    assert sizes[-1] - sizes[2] < 4 << 20, sizes


def resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_data_loader_over_a_store_that_another_filled(
    pack: Pack, backbone: Path, expected: Tensor
) -> None:
    use(pack, backbone).__getitems__(list(range(10)))
    images = torch.cat([images for images, _ in DataLoader(use(pack, backbone), 6)])
    assert torch.equal(images, expected)


def test_fast_stores_are_told_apart_by_their_switches(pack: Pack, backbone: Path) -> None:
    """A decoder on an open backbone leaves it as it is, so its images are others."""
    shared = open_backbone(pack.recipe.backbone, path=backbone)
    own = use(pack, backbone, mode="fast").images.identity
    other = D3MDataset(pack, backbone=shared, mode="fast", quiet=True).images.identity
    assert own.mode == "fast:bf16,channels_last,fused_attention"
    assert other.mode == "fast:"
    assert own.key != other.key
    assert use(pack, backbone).images.identity.mode == "exact"


def test_a_store_that_is_there_is_used_however_full_the_disk(
    pack: Pack, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = use(pack, backbone)
    list(first)
    first.close()
    usage = shutil.disk_usage("/")._replace(free=100_000)  # the store takes 258 kB
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("d3pack.dataset.images.Decoder", None)
    assert len(list(use(pack, backbone))) == 21


def test_a_wrong_mode_or_backbone_leaves_no_store(pack: Pack, backbone: Path) -> None:
    with pytest.raises(UsageError, match="mode='turbo'"):
        use(pack, backbone, mode="turbo")
    with pytest.raises(NotFoundError, match="no backbone directory nothere"):
        use(pack, Path("nothere"))
    with pytest.raises(D3MError):
        use(pack, Path(__file__).parent)[0]
    assert shelf.entries(Path(os.environ["D3PACK_HOME"])) == []


def test_a_relative_folder_is_the_one_of_then(
    pack: Pack, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = use(pack, backbone, cache_dir="here", cache="disk")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    dataset[0]
    assert len(shelf.entries(tmp_path / "here")) == 1


@pytest.mark.parametrize("wrong", [1.7, True, None])
def test_what_is_no_class_is_refused(pack: Pack, backbone: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match="is no class"):
        use(pack, backbone).select_classes([wrong])


def test_one_name_is_no_list_of_classes(pack: Pack, backbone: Path) -> None:
    with pytest.raises(UsageError, match=r"write \['penguin'\]"):
        use(pack, backbone, classes="penguin")


def test_a_state_without_an_epoch_is_refused(pack: Pack, backbone: Path) -> None:
    dataset = use(pack, backbone)
    state = dataset.state_dict()
    del state["epoch"]
    with pytest.raises(UsageError, match="not a dataset state"):
        dataset.load_state_dict(state)


def test_an_address_without_its_scheme_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="hf://datasets/org/name"):
        D3MDataset("org/x/a.d3m")
