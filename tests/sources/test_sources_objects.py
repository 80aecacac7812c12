"""Sources in object stores: the images of local ones, read in parts, and no wrong one."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from object_stores import FaultyStore, failing
from source_world import (
    CLASSES,
    PER_CLASS,
    make_parquet,
    make_shards,
    make_tar,
    members,
    pixels,
    png,
)

from d3pack.errors import NotFoundError, SourceError, StorageError
from d3pack.sources import Source, open_source, spill
from d3pack.system import ObjectPath

STORE = "faulty://bucket"


@pytest.fixture(autouse=True)
def fresh_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_spills", {})


def make_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members():
            archive.writestr(f"photos/{name}", data)
    return path


def copy(here: Path, there: str) -> None:
    """Put a file, or the files of a folder, into a store."""
    for file in sorted(here.rglob("*")) if here.is_dir() else [here]:
        if file.is_file():
            below = f"/{file.relative_to(here).as_posix()}" if here.is_dir() else ""
            ObjectPath(there + below).write_bytes(file.read_bytes())


def images(source: Source) -> list[tuple[str, str, np.ndarray]]:
    return [
        (name, key, np.asarray(image))
        for c, name in enumerate(source.classes)
        for key, image in source.iter_class(c)
    ]


def check_same(there: Source, here: Source) -> None:
    assert there.classes == here.classes
    assert there.kind == here.kind
    assert there.counts == here.counts == (PER_CLASS,) * len(CLASSES)
    for one, other in zip(images(there), images(here), strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one[2], other[2])


CONTAINERS: dict[str, Callable[[Path, Path], Path]] = {
    "tree": lambda folder, tree: tree,
    "photos.tar": lambda folder, tree: make_tar(folder / "photos.tar"),
    "photos.tar.gz": lambda folder, tree: make_tar(folder / "photos.tar.gz", "w:gz"),
    "photos.zip": lambda folder, tree: make_zip(folder / "photos.zip"),
    "shards": lambda folder, tree: make_shards(folder / "shards"),
    "shards/train-{0000..0001}.tar": lambda folder, tree: make_shards(folder / "shards"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_source_in_a_store_has_the_images_of_the_local_one(
    faulty: type[FaultyStore], tmp_path: Path, tree: Path, name: str
) -> None:
    made = CONTAINERS[name](tmp_path, tree)
    copy(made, f"{STORE}/{made.name}")
    source = open_source(f"{STORE}/{name}")
    check_same(source, open_source(tmp_path / name))
    calls = len(faulty.calls)
    assert source.fingerprint() == open_source(f"{STORE}/{name}").fingerprint()
    stamped = open_source(f"{STORE}/{name}")
    calls = len(faulty.calls)
    stamped.fingerprint()
    assert len(faulty.calls) == calls  # names, sizes and ETags are known already
    check_same(source, open_source(tmp_path / name))
    assert len(faulty.calls) == calls  # images are on the local disk now


def test_fingerprint_changes_with_an_object(faulty: type[FaultyStore], tree: Path) -> None:
    copy(tree, f"{STORE}/tree")
    before = open_source(f"{STORE}/tree").fingerprint()
    key = f"bucket/tree/{members()[0][0]}"
    data = bytearray(faulty.objects[key])
    data[len(data) // 2] ^= 1
    faulty.objects[key] = bytes(data)
    assert open_source(f"{STORE}/tree").fingerprint() != before


def test_split_is_chosen_in_a_store(faulty: type[FaultyStore], tree: Path) -> None:
    for split in ("train", "val"):
        copy(tree, f"{STORE}/photos/{split}")
    source = open_source(f"{STORE}/photos/", split="val")
    assert source.classes == CLASSES
    np.testing.assert_array_equal(np.asarray(source.load(1, 2)), pixels(1, 2))
    with pytest.raises(SourceError, match="no split 'test'"):
        open_source(f"{STORE}/photos", split="test")


def test_missing_source_is_not_found(faulty: type[FaultyStore]) -> None:
    for name in ("none", "none/train-{0..1}.tar", "none.tar"):
        with pytest.raises(NotFoundError):
            open_source(f"{STORE}/{name}")


def test_shards_are_read_by_blocks(faulty: type[FaultyStore]) -> None:
    """Images of a megabyte with their labels: one pass, in requests of 4 MiB."""
    big = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(12):
            for ext, data in (("png", png(big)), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    faulty.objects["bucket/a.tar"] = out.getvalue()
    source = open_source(f"{STORE}/a.tar")
    size = len(out.getvalue())
    assert size > 12 << 20
    assert faulty.calls.count("read") <= 2 + size // (4 << 20)  # a look first, then all of it
    np.testing.assert_array_equal(np.asarray(source.load(1, 5)), big)


@pytest.mark.parametrize("name", ["photos.tar", "photos.zip", "tree"])
def test_failing_store_loses_no_image(
    faulty: type[FaultyStore], tmp_path: Path, tree: Path, name: str
) -> None:
    """What fails for the moment is read again; what fails for good is an error, not a skip."""
    made = CONTAINERS[name](tmp_path, tree)
    copy(made, f"{STORE}/{name}")
    source = open_source(f"{STORE}/{name}")
    faulty.fault = failing(2, TimeoutError())
    assert len(images(source)) == PER_CLASS * len(CLASSES)
    spill._spills.clear()
    again = open_source(f"{STORE}/{name}")
    faulty.fault = failing(999, TimeoutError())
    with pytest.raises(StorageError, match="fails at the moment"):
        images(again)
    assert again.skipped == []


def test_object_that_changed_since_it_was_listed_is_refused(
    faulty: type[FaultyStore], tree: Path
) -> None:
    copy(tree, f"{STORE}/tree")
    source = open_source(f"{STORE}/tree")
    faulty.objects[f"bucket/tree/{members()[0][0]}"] = png(pixels(2, 3))
    with pytest.raises(StorageError, match="changed since the source was listed"):
        source.load(0, 0)


def test_spill_is_bounded(
    faulty: type[FaultyStore], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tree, f"{STORE}/tree")
    monkeypatch.setattr(spill, "LIMIT", 1000)
    source = open_source(f"{STORE}/tree")
    first = images(source)
    calls = len(faulty.calls)
    again = images(source)
    kept = sum(len(data) for _, data in members())
    assert len(first) == len(again) == PER_CLASS * len(CLASSES)
    assert len(faulty.calls) > calls
    (one,) = spill._spills.values()
    assert 0 < one._end <= 1000 < kept


@pytest.mark.e2e
@pytest.mark.parametrize("name", [*CONTAINERS, "photos.parquet", "table"])
def test_source_in_a_bucket_has_the_images_of_the_local_one(
    any_bucket: str, tmp_path: Path, tree: Path, name: str, hub_cache: None
) -> None:
    if name == "table":
        (tmp_path / "table").mkdir()
        make_parquet(tmp_path / "table" / "train-00000.parquet")
        made = tmp_path / "table"
    elif name == "photos.parquet":
        made = make_parquet(tmp_path / name)
    else:
        made = CONTAINERS[name](tmp_path, tree)
    copy(made, f"{any_bucket}/{made.name}")
    check_same(open_source(f"{any_bucket}/{name}"), open_source(tmp_path / name))
