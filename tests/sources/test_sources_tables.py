"""Shards and tables as people have them: other columns, other labels, rows without an image."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_world import CLASSES, make_parquet, make_shards, pixels, png

from d3pack.errors import D3MError, HubError, NotFoundError, SourceError
from d3pack.sources import open_source

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("hub_cache")


def save(path: Path, rows: Mapping[str, Any], **features: Any) -> Path:
    named = datasets.Features(features) if features else None
    datasets.Dataset.from_dict(rows, features=named).to_parquet(str(path))
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_table_with_words_as_labels_and_other_column_names(tmp_path: Path) -> None:
    rows = {"img": [png(pixels(c, 0)) for c in (1, 0, 1)], "target": ["pear", "fig", "pear"]}
    source = open_source(save(tmp_path / "a.parquet", rows))
    assert source.classes == ("fig", "pear")
    assert source.counts == (1, 2)
    assert np.array_equal(np.asarray(next(iter(source.iter_class(0)))[1]), pixels(0, 0))


def test_table_rows_name_a_file_or_hold_nothing(tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(png(pixels(0, 0)))
    rows = {
        "image": [
            {"bytes": None, "path": str(file)},
            None,
            {"bytes": png(pixels(1, 0)), "path": None},
        ],
        "label": [0, 0, 1],
    }
    path = save(
        tmp_path / "a.parquet", rows,
        image=datasets.Image(), label=datasets.ClassLabel(names=["fig", "pear"]),
    )  # fmt: skip
    source = open_source(path)
    assert source.counts == (2, 1)
    found = [np.asarray(image) for _, image in source.iter_class(0)]
    assert len(found) == 1
    assert np.array_equal(found[0], pixels(0, 0))
    assert [skip.reason for skip in source.skipped] == ["the row holds no image bytes"]
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1, None, 1], ("0", "1")),
        (["a", "b", None, "b"], ("a", "b")),
        ([0.5, 1.5, float("nan"), 1.5], ("0.5", "1.5")),
    ],
)
def test_table_counts_rows_without_a_label(
    tmp_path: Path, labels: list[Any], classes: tuple[str, ...]
) -> None:
    rows = {"image": [png(pixels(0, i)) for i in range(4)], "label": labels}
    source = open_source(save(tmp_path / "a.parquet", rows))
    assert (source.classes, source.counts) == (classes, (1, 2))
    assert [(skip.key, skip.reason) for skip in source.skipped] == [
        ("000000002", "no label in its row")
    ]
    assert source.names(1) == ["000000001", "000000003"]
    assert np.array_equal(np.asarray(source.load(1, 1)), pixels(0, 3))


def test_table_with_missing_or_unused_label_names(tmp_path: Path) -> None:
    rows = {"image": [png(pixels(0, i)) for i in range(5)], "label": [0, -1, 1, None, 1]}
    path = save(tmp_path / "a.parquet", rows,
                image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))  # fmt: skip
    source = open_source(path)
    assert (source.counts, source.refused) == ((1, 2), 2)
    assert source.names(1) == ["000000002", "000000004"]
    more = datasets.ClassLabel(names=["a", "b", "c"])
    path = save(tmp_path / "b.parquet", rows, image=datasets.Image(), label=more)
    with pytest.raises(SourceError, match="class 'c' holds no image; no row has this label"):
        open_source(path)


def test_table_refuses_labels_that_are_lists(tmp_path: Path) -> None:
    rows = {"image": [png(pixels(0, i)) for i in range(3)], "label": [[0], [1], [0, 1]]}
    with pytest.raises(SourceError, match="'label' does not hold one label for each image"):
        open_source(save(tmp_path / "a.parquet", rows))


def test_table_split_is_chosen_by_file_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    save(tmp_path / "data" / "test-00000-of-00001.parquet",
         {"image": [png(pixels(0, 0))] * 2, "label": ["a", "b"]})  # fmt: skip
    assert open_source(tmp_path).classes == CLASSES
    assert open_source(tmp_path, split="test").classes == ("a", "b")


@pytest.mark.parametrize(
    ("columns", "missing"),
    [({"image": [b"x"], "words": ["a"]}, "label"), ({"audio": [b"x"], "label": ["a"]}, "image")],
)
def test_table_without_images_or_labels_is_refused(
    tmp_path: Path, columns: dict[str, list[Any]], missing: str
) -> None:
    with pytest.raises(SourceError, match=f"no {missing} column among"):
        open_source(save(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError("nothing there"), NotFoundError, "no dataset org/pets on the Hub"),
        (ConnectionError("the line is dead\nmore"), HubError, "cannot load org/pets: the line is"),
        (ValueError(), HubError, "cannot load org/pets: ValueError"),
    ],
)
def test_hub_failure_is_one_line_of_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[D3MError], words: str
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match=words) as caught:
        open_source("hf://datasets/org/pets")
    assert "\n" not in str(caught.value)


def test_invalid_hub_address_is_refused() -> None:
    for address in ("hf://datasets/", "hf://datasets/a/b/c"):
        with pytest.raises(SourceError, match="expected hf://datasets/org/name"):
            open_source(address)


def test_shards_with_labels_in_json_and_names_in_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    keys = ("label", "class", "cls", "class_name")
    members: dict[str, bytes] = {}
    for i, key in enumerate(keys):
        members[f"{i:03d}.png"] = png(pixels(i % 2, i))
        members[f"{i:03d}.json"] = json.dumps({"width": 11, key: i % 2}).encode()
    shard(folder / "a.tar", members)
    assert open_source(folder).classes == ("0", "1")
    (folder / "classes.txt").write_text("fig\npear\n")
    named = open_source(folder)
    assert (named.classes, named.counts) == (("fig", "pear"), (2, 2))


def test_single_shard_with_labels_in_json(tmp_path: Path) -> None:
    flat: dict[str, bytes] = {}
    tree: dict[str, bytes] = {}
    for i in range(4):
        label = json.dumps({"label": "ab"[i % 2]}).encode()
        for ext, data in (("png", png(pixels(i % 2, i))), ("json", label)):
            flat[f"./{i:03d}.{ext}"] = tree[f"class {i % 2}/{i:03d}.{ext}"] = data
    source = open_source(shard(tmp_path / "a.tar", flat))
    assert (source.kind, source.classes, source.counts) == ("webdataset", ("a", "b"), (2, 2))
    assert open_source(shard(tmp_path / "tree.tar", tree)).classes == ("class 0", "class 1")


def test_json_without_a_label_keeps_the_label(tmp_path: Path) -> None:
    members = {
        "0.cls": b"0", "0.json": b'{"width": 3}', "0.png": png(pixels(0, 0)),
        "1.cls": b"1", "1.json": b"{broken", "1.png": png(pixels(1, 0)),
    }  # fmt: skip
    source = open_source(shard(tmp_path / "a.tar", members))
    assert (source.classes, source.counts, source.skipped) == (("0", "1"), (1, 1), [])


def test_shard_images_without_a_label_are_skipped(tmp_path: Path) -> None:
    members = {
        "a/000.png": png(pixels(0, 0)), "a/000.cls": b"0",
        "a/001.png": png(pixels(0, 1)),
        "a/002.png": png(pixels(0, 2)), "a/002.json": b"{broken",
        "a/003.png": png(pixels(1, 0)), "a/003.cls": b"1",
        "a/004.png": png(pixels(0, 3)), "a/004.json": b'{"width": 3}',
        "a/005.png": png(pixels(0, 4)), "a/005.cls": b"\xff",
    }  # fmt: skip
    source = open_source(shard(tmp_path / "s.tar", members))
    assert (source.kind, source.counts) == ("webdataset", (1, 1))
    assert [skip.key.rpartition("/")[2] for skip in source.skipped] == ["001", "002", "004", "005"]
    assert {skip.reason for skip in source.skipped} == {"no label beside it"}


def test_missing_shards_are_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    with pytest.raises(NotFoundError, match=r"1 shards are missing, first train-0002\.tar"):
        open_source(f"{folder}/train-{{0000..0002}}.tar")
    with pytest.raises(SourceError, match="the range of shards is too long"):
        open_source(f"{folder}/train-{{0..9999999}}.tar")
    (folder / "train-0001.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(SourceError, match=r"train-0001\.tar is not a readable shard"):
        open_source(folder)


def test_shards_without_any_label_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    shard(tmp_path / "s" / "a.tar", {"000.png": png(pixels(0, 0)), "000.txt": b"a fig"})
    with pytest.raises(SourceError, match=r"no image with a \.cls or \.json label"):
        open_source(tmp_path / "s")


@pytest.mark.posix
def test_table_rows_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """A table of a stranger would put private pictures of its reader into a pack."""
    private, folder = tmp_path / "private.png", tmp_path / "table"
    private.write_bytes(png(pixels(0, 0)))
    folder.mkdir()
    (folder / "link.png").symlink_to(private)
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    named = [str(private), str(folder / "link.png"), str(folder / "../private.png")]
    named += [str(folder / "pipe.png"), "/dev/zero", "https://example.org/x.png"]
    rows = {
        "image": [{"bytes": png(pixels(0, 0)), "path": None}]
        + [{"bytes": None, "path": name} for name in named],
        "label": [0] + [1] * len(named),
    }
    # not by `datasets`, which puts the bytes of files into what it writes
    pq.write_table(pa.table(rows), folder / "a.parquet")
    source = open_source(folder / "a.parquet")
    assert list(source.iter_class(1)) == []
    reasons = [skip.reason for skip in source.skipped]
    assert [("outside" in r, "no regular file" in r) for r in reasons] == [
        (True, False), (True, False), (True, False), (False, True), (True, False), (True, False),
    ]  # fmt: skip
    assert len(source.fingerprint()) == 64
