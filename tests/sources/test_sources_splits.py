"""Splits: the part that was asked for, or one line that names what there is. Never all of it."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_world import CLASSES, make_parquet, make_shards, make_tar, pixels, png

from d3pack.errors import SourceError
from d3pack.sources import open_source


def fill(root: Path, *folders: str) -> Path:
    """Two classes of one image in each folder, named after it."""
    for folder in folders:
        for name in ("a", "b"):
            (root / folder / f"{folder}-{name}").mkdir(parents=True)
            (root / folder / f"{folder}-{name}" / "0.png").write_bytes(png(pixels(0, 0)))
    return root


def other_shard(path: Path) -> Path:
    """A shard of the classes 7 and 8, which no training shard holds."""
    with tarfile.open(path, "w") as tar:
        for c in (7, 8):
            for ext, data in (("cls", str(c).encode()), ("png", png(pixels(c, 0)))):
                info = tarfile.TarInfo(f"{c}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("folders", "split", "found"),
    [
        (("train", "val"), "train", "train"),
        (("training", "validation"), "train", "training"),
        (("training", "validation"), "valid", "validation"),
        (("Train", "Test"), "train", "Train"),
        (("Train", "Test"), "testing", "Test"),
        (("train", "test", "__MACOSX", ".cache"), "train", "train"),
    ],
)
def test_split_is_chosen_among_folders(
    tmp_path: Path, folders: tuple[str, ...], split: str, found: str
) -> None:
    fill(tmp_path / "set", *folders)
    assert open_source(tmp_path / "set", split=split).classes == (f"{found}-a", f"{found}-b")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize("folders", [("train", "val"), ("Training", "Valid"), ("train",)])
def test_missing_split_is_refused(tmp_path: Path, kind: str, folders: tuple[str, ...]) -> None:
    root = fill(tmp_path / "set", *folders)
    where = root
    if kind == "tar":
        where = tmp_path / "set.tar"
        with tarfile.open(where, "w") as tar:
            tar.add(root, "set")
    elif kind == "zip":
        where = tmp_path / "set.zip"
        with zipfile.ZipFile(where, "w") as archive:
            for path in root.rglob("*.png"):
                archive.write(path, path.relative_to(tmp_path))
    with pytest.raises(SourceError, match=f"no split 'test'; there are {', '.join(folders)}"):
        open_source(where, split="test")
    assert open_source(where, split="train").classes == (f"{folders[0]}-a", f"{folders[0]}-b")


def test_hidden_folder_is_not_a_class(tree: Path) -> None:
    (tree / "__MACOSX" / "lemon").mkdir(parents=True)
    assert open_source(tree).classes == CLASSES


def test_shards_of_another_split_are_left_out(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    (folder / "classnames.txt").unlink()
    first = open_source(folder).fingerprint()
    other_shard(folder / "val-0000.tar")
    assert open_source(folder).fingerprint() == first
    assert open_source(folder, split="validation").classes == ("7", "8")
    with pytest.raises(SourceError, match="no split 'test'; there are train, val"):
        open_source(folder, split="test")


def test_shards_without_a_split_are_all_used(tmp_path: Path) -> None:
    other_shard(tmp_path / "0000.tar")
    other_shard(tmp_path / "constraints-0001.tar")
    for split in ("train", "test"):
        assert open_source(tmp_path, split=split).counts == (2, 2)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("cifar-train.parquet", "cifar-test.parquet"),
        ("data/train/0000.parquet", "data/test/0000.parquet"),
        ("data/Training_00.parquet", "data/my.testset.parquet"),
    ],
)
def test_split_is_chosen_among_parquet_files(tmp_path: Path, train: str, test: str) -> None:
    for name in (train, test):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_parquet(tmp_path / name)
    (tmp_path / "data" / ".old").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / ".old" / "train.parquet").write_bytes(b"what a download left")
    (tmp_path / "x.parquet").write_bytes(b"never opened: it is of no split, and others are")
    for split in ("train", "test"):
        assert open_source(tmp_path, split=split).counts == (4, 4, 4)
    with pytest.raises(SourceError, match="no split 'val'; there are test, train"):
        open_source(tmp_path, split="val")


@pytest.mark.usefixtures("hub_cache")
def test_parquet_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match="no split 'test'; there are train"):
        open_source(tmp_path, split="test")
    make_parquet(tmp_path / "extra-0.parquet")  # a split of this data set's own
    assert open_source(tmp_path, split="extra").counts == (4, 4, 4)
    (tmp_path / "train-0.parquet").rename(tmp_path / "a.parquet")
    assert open_source(tmp_path).counts == (8, 8, 8)


def test_tar_below_folders_that_are_not_splits(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", prefix="x/tests/")
    assert open_source(path).classes == CLASSES
