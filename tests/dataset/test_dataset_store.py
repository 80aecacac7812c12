"""The stores: shared, checked, bounded, safe against kills, two writers and a full disk."""

from __future__ import annotations

import errno
import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_packs import flip
from torch import Tensor

from d3pack.dataset import StoreIdentity, disk, list_stores, remove_store, verify_store
from d3pack.dataset.disk import DiskStore, open_disk_store, record_of
from d3pack.dataset.store import MemoryStore, RecentStore, TieredStore, free_memory
from d3pack.errors import UsageError

SHAPE = (3, 4, 5)


def identity(images: int = 10, root: str = "a", **more: Any) -> StoreIdentity:
    known = {"numerics": "exact", "device": "cpu", "software": "torch"}
    return StoreIdentity(root=root, images=images, shape=SHAPE, **{**known, **more})


def opened(home: Path, images: StoreIdentity, limit: int = 1 << 30) -> DiskStore:
    store = open_disk_store(home, images, limit)
    assert store is not None
    return store


def pictures(numbers: Iterable[int]) -> Tensor:
    """Images by which their number can be told."""
    images = [torch.full(SHAPE, int(n) + 1, dtype=torch.uint8) for n in numbers]
    return torch.stack(images)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


# One behaviour, four stores


STORES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda home: MemoryStore(identity(), torch.device("cpu")),
    "recent": lambda home: RecentStore(10, 10),
    "disk": lambda home: opened(home, identity()),
    "tiered": lambda home: TieredStore(
        MemoryStore(identity(), torch.device("cpu")), opened(home, identity())
    ),
}


@pytest.mark.parametrize("kind", STORES)
def test_store_reads_back_what_was_written(kind: str, tmp_path: Path) -> None:
    store = STORES[kind](tmp_path)
    assert store.missing(ids(7, 2, 2)).tolist() == [7, 2, 2]
    assert store.count() == 0
    store.write(ids(7, 2), pictures([7, 2]))
    assert store.missing(ids(2, 3, 7)).tolist() == [3]
    assert torch.equal(store.read(ids(2, 7, 2)), pictures([2, 7, 2]))
    assert store.count() == 2
    with store.claimed(ids(3, 8), 5) as numbers:
        assert numbers.tolist() == ([3, 8, 9] if kind == "recent" else [3, 8, 9, 0, 1])
    with store.claimed(ids(3), 1) as numbers:
        assert numbers.tolist() == [3]
    store.read(ids(2))[:] = 0
    assert torch.equal(store.read(ids(2)), pictures([2])), "a reader cannot change the store"
    store.close()


def test_recent_store_drops_the_oldest_images() -> None:
    store = RecentStore(10, 3)
    store.write(ids(0, 1, 2), pictures([0, 1, 2]))
    store.write(ids(3), pictures([3]))
    assert store.missing(ids(0, 1, 2, 3)).tolist() == [0]


def test_tiered_store_copies_images_from_disk_to_memory(tmp_path: Path) -> None:
    with_images = opened(tmp_path, identity())
    with_images.write(ids(4, 5), pictures([4, 5]))
    front = MemoryStore(identity(), torch.device("cpu"))
    store = TieredStore(front, with_images)
    assert store.missing(ids(4, 6)).tolist() == [6]
    assert front.missing(ids(4, 5)).tolist() == [5]
    assert torch.equal(store.read(ids(4)), pictures([4]))


# On disk


def test_disk_store_is_shared_by_equal_identities_only(tmp_path: Path) -> None:
    opened(tmp_path, identity()).write(ids(1), pictures([1]))
    assert torch.equal(opened(tmp_path, identity()).read(ids(1)), pictures([1]))
    keys = {identity().key}
    for images in (
        identity(root="b"),
        identity(numerics="fast"),
        identity(device="cuda X"),
        identity(software="torch 3"),
    ):
        keys.add(images.key)
        assert opened(tmp_path, images).missing(ids(1)).tolist() == [1]
    assert len(keys) == 5
    assert len(list_stores(tmp_path)) == 5


ONE_OWNER = pytest.mark.skipif(
    sys.platform != "linux", reason="here all locks of a process belong together"
)


@ONE_OWNER
def test_disk_store_gives_an_image_to_one_process_at_a_time(tmp_path: Path) -> None:
    one, other, third = (opened(tmp_path, identity()) for _ in range(3))
    one.write(ids(4), pictures([4]))
    with one.claimed(ids(2), 2) as mine:
        assert mine.tolist() == [2, 3]
        with other.claimed(ids(1, 2, 3), 2) as others:
            assert others.tolist() == [1, 5], "those that are free, and one to fill the group"
        with other.claimed(ids(2, 3), 4) as others:
            assert others.tolist() == [5, 6, 7, 8], "others, where none of them is free"
            with third.claimed(ids(5), 9) as more:
                assert more.tolist() == [9, 0, 1], "all that are left"
    with other.claimed(ids(2), 1) as others:
        assert others.tolist() == [2]


@ONE_OWNER
def test_disk_store_does_not_claim_what_another_process_has_finished(tmp_path: Path) -> None:
    one, other = opened(tmp_path, identity()), opened(tmp_path, identity())
    missing = other.missing(ids(1, 2))
    one.write(ids(1), pictures([1]))
    with other.claimed(missing, 1) as mine:
        assert mine.tolist() == [2]


@pytest.mark.parametrize("offset", [0, 59])
def test_disk_store_reports_a_flipped_byte_once(tmp_path: Path, offset: int) -> None:
    store = opened(tmp_path, identity())
    store.write(np.arange(10), pictures(np.arange(10)))
    flip(store.path / "pixels", 3 * 60 + offset)
    again = opened(tmp_path, identity())
    with pytest.warns(RuntimeWarning, match=r"1 image\(s\) in .* fail their checksum"):
        assert again.missing(np.arange(10)).tolist() == [3]
    again.write(ids(3), pictures([3]))
    last = opened(tmp_path, identity())
    assert last.missing(np.arange(10)).size == 0
    assert torch.equal(last.read(np.arange(10)), pictures(np.arange(10)))


@pytest.mark.parametrize("byte", range(8))
def test_disk_store_ignores_a_flipped_record(tmp_path: Path, byte: int) -> None:
    store = opened(tmp_path, identity())
    store.write(ids(3), pictures([3]))
    flip(store.path / "index", 3 * 8 + byte)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert opened(tmp_path, identity()).missing(ids(3)).tolist() == [3]


def test_record_covers_every_bit_of_an_image(tmp_path: Path) -> None:
    row = bytes(range(60))
    good = record_of(5, row)
    for bit in range(480):
        bad = bytearray(row)
        bad[bit // 8] ^= 1 << bit % 8
        assert record_of(5, bytes(bad)) != good
    assert record_of(6, row) != good, "an image at another's place is refused"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", b"{"),
        ("meta.json", b"[]"),
        ("meta.json", None),
        ("pixels", b"short"),
        ("pixels", None),
        ("index", b""),
        ("index", None),
        ("lock", None),
    ],
)
def test_disk_store_replaces_a_damaged_folder(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    store = opened(tmp_path, identity())
    store.write(ids(1), pictures([1]))
    path = store.path
    store.close()
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    again = opened(tmp_path, identity())
    again.write(ids(2), pictures([2]))
    assert again.missing(ids(1, 2)).tolist() == [1]


def test_eviction_removes_the_longest_unused_store_and_keeps_those_in_use(tmp_path: Path) -> None:
    size = identity().size
    stores = {root: opened(tmp_path, identity(root=root)) for root in "abc"}
    for age, root in enumerate("cab"):  # c was used longest ago, then a
        os.utime(stores[root].path / "meta.json", (1000 + age, 1000 + age))
    stores["a"].close()
    stores["b"].close()
    stores["d"] = opened(tmp_path, identity(root="d"), limit=3 * size)
    left = {entry.identity and entry.identity.root for entry in list_stores(tmp_path)}
    assert left == {"b", "c", "d"}, "c is in use, so a goes"
    assert open_disk_store(tmp_path, identity(root="e"), 2 * size) is None, "b alone is not enough"
    assert open_disk_store(tmp_path, identity(root="e"), size - 1) is None
    assert len(list_stores(tmp_path)) == 3, "nothing is evicted unless that makes room"


def test_eviction_counts_stores_of_another_version_and_removes_them_first(tmp_path: Path) -> None:
    for root in "ab":
        store = opened(tmp_path, identity(root=root))
        store.write(ids(*range(10)), pictures(range(10)))
        store.close()
    meta = store.path / "meta.json"
    meta.write_text(meta.read_text().replace(f'"format": {disk.FORMAT}', '"format": 99'))
    unknown, known = list_stores(tmp_path)
    assert unknown.path == store.path
    assert unknown.identity is None
    assert known.identity == identity(root="a")
    limit = 2 * identity().size + unknown.size - 1
    assert open_disk_store(tmp_path, identity(root="c"), limit) is not None
    assert {e.identity and e.identity.root for e in list_stores(tmp_path)} == {"a", "c"}


def test_disk_store_works_after_its_folder_was_deleted(tmp_path: Path) -> None:
    store = opened(tmp_path, identity())
    store.write(ids(1), pictures([1]))
    assert not remove_store(store.path), "it is in use"
    import shutil

    shutil.rmtree(store.path)
    store.write(ids(2), pictures([2]))
    assert torch.equal(store.read(ids(1, 2)), pictures([1, 2]))


def test_disk_store_clears_old_leftovers_of_killed_processes(tmp_path: Path) -> None:
    opened(tmp_path, identity()).close()
    images = tmp_path / "images"
    old, new = images / ".d3pack-0123456789abcdef.part", images / ".gone-y-2-2"
    for path in (old, new):
        path.mkdir()
        (path / "pixels").touch()
    os.utime(old, (1000, 1000))
    opened(tmp_path, identity(root="b"))
    assert not old.exists()
    assert new.exists(), "somebody may be at work in it"


def _write_all(home: str, start: int, done: Any) -> None:
    store = opened(Path(home), identity(images=400))
    order = np.roll(np.arange(400), start)
    for part in np.array_split(order, 50):
        store.write(part, pictures(part % 200))
    done.put(store.missing(np.arange(400)).tolist())


@pytest.mark.posix
def test_disk_store_is_complete_after_two_writers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    done: Any = context.Queue()
    writers = [
        context.Process(target=_write_all, args=(str(tmp_path), start, done)) for start in (0, 37)
    ]
    for writer in writers:
        writer.start()
    assert [done.get(timeout=20) for _ in writers] == [[], []]
    for writer in writers:
        writer.join()
    store = opened(tmp_path, identity(images=400))
    assert store.missing(np.arange(400)).size == 0
    assert torch.equal(store.read(np.arange(400)), pictures(np.arange(400) % 200))


def _write_for_ever(home: str) -> None:
    store = opened(Path(home), identity(images=5000))
    for number in range(5000):
        store.write(ids(number), pictures([number % 200]))
    time.sleep(60)


@pytest.mark.posix
@pytest.mark.e2e
def test_disk_store_is_valid_after_kill_9(tmp_path: Path) -> None:
    # one image is there from the start, so that there is always something to compare
    opened(tmp_path, identity(images=5000)).write(ids(4999), pictures([4999 % 200]))
    context = multiprocessing.get_context("fork")
    for delay in (0.0, 0.01, 0.03, 0.1):
        writer = context.Process(target=_write_for_ever, args=(str(tmp_path),))
        writer.start()
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        store = opened(tmp_path, identity(images=5000))
        missing = store.missing(np.arange(5000))
        have = np.setdiff1d(np.arange(5000), missing)
        assert torch.equal(store.read(have), pictures(have % 200))
        again = missing[:1] if len(missing) else ids(0)  # a quick machine may have written all
        store.write(again, pictures(again % 200))  # the lock died with its holder
        assert not store.missing(again).size
        reader = opened(tmp_path, identity(images=5000))
        assert torch.equal(reader.read(again), pictures(again % 200))
        reader.close()
        store.close()


@pytest.mark.linux
@pytest.mark.heavy
def test_disk_store_reads_in_constant_memory(tmp_path: Path) -> None:
    """200 MB more of images, not 20 MB more of resident memory."""
    script = """
import sys, numpy as np, torch
from pathlib import Path
from d3pack.dataset import StoreIdentity, disk
disk._RESIDENT = 64 << 20  # a quarter of the real one, to need a quarter of the images
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"): return int(line.split()[1]) / 1024
def run(images):
    identity = StoreIdentity("r", "exact", "cpu", "t", images, (3, 256, 256))
    store = disk.open_disk_store(Path(sys.argv[1]), identity, 1 << 40)
    for part in np.array_split(np.arange(images), images // 50):
        store.write(part, torch.zeros((len(part), 3, 256, 256), dtype=torch.uint8))
    store = disk.open_disk_store(Path(sys.argv[1]), identity, 1 << 40)
    peak = 0
    for part in np.array_split(np.random.permutation(images), images // 50):
        assert not store.missing(part).size
        store.read(part)
        peak = max(peak, resident())
    return peak
run(600)  # what allocators take once does not count
small, large = run(600), run(1600)
assert large - small < 20, (small, large)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_disk_store_describes_its_images_in_the_meta_file(tmp_path: Path) -> None:
    store = opened(tmp_path, identity())
    meta = json.loads((store.path / "meta.json").read_text())
    assert meta["root"] == "a"
    assert meta["shape"] == [3, 4, 5]
    assert meta["images"] == 10


def test_memory_store_refuses_more_than_the_machine_has() -> None:
    with pytest.raises(UsageError, match="does not fit on cpu"):
        MemoryStore(identity(images=10**13), torch.device("cpu"))


# Systems without POSIX calls


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Windows does not have is gone; its locks and renames are checked in their own tests."""
    for module, names in {
        os: ("pwrite", "pread", "O_CLOEXEC", "sysconf", "sysconf_names", "posix_fallocate"),
        mmap: ("PROT_READ", "MAP_SHARED", "MADV_DONTNEED"),
    }.items():
        for name in names:
            monkeypatch.delattr(module, name)
    monkeypatch.setattr(disk, "_RENAMES_OPEN_FOLDERS", False)


@pytest.mark.usefixtures("windows")
def test_disk_store_works_without_posix_calls(tmp_path: Path) -> None:
    store = opened(tmp_path, identity())
    store.write(ids(7, 2), pictures([7, 2]))
    store.write(ids(2, 3), pictures([2, 3]))
    assert store.missing(np.arange(10)).tolist() == [0, 1, 4, 5, 6, 8, 9]
    assert torch.equal(store.read(ids(2, 7, 3)), pictures([2, 7, 3]))
    flip(store.path / "pixels", 7 * 60 + 5)
    store.close()
    (entry,) = list_stores(tmp_path)
    assert (entry.decoded, entry.identity) == (3, identity())
    assert verify_store(entry) == [7]
    assert verify_store(entry) == []
    assert opened(tmp_path, identity()).missing(ids(2, 3, 7)).tolist() == [7]


@pytest.mark.linux
@pytest.mark.usefixtures("windows")
def test_store_is_removed_where_open_folders_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, identity())
    path = store.path
    assert not remove_store(path), "it is in use"
    store.close()
    del store  # and its maps
    real, handles = os.rename, Path("/proc/self/fd")

    def rename(source: Path, target: Path) -> None:
        links = [os.readlink(link) for link in handles.iterdir() if link.exists()]
        if any(Path(link).is_relative_to(source) for link in links):
            raise PermissionError(errno.EACCES, "in use", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert remove_store(path)
    assert list_stores(tmp_path) == []


@pytest.mark.usefixtures("windows")
def test_free_memory_is_known_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert free_memory() == 4 << 30
