"""Sources: every container gives the same classes and pixels."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
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

from d3pack.errors import SourceError
from d3pack.sources import Source, open_source


def check_contents(source: Source, *, ordered: bool = True) -> None:
    assert source.classes == CLASSES
    assert source.counts == (PER_CLASS,) * len(CLASSES)
    for c in range(len(CLASSES)):
        found = [np.asarray(image) for _, image in source.iter_class(c)]
        assert len(found) == PER_CLASS
        expected = [pixels(c, i) for i in range(PER_CLASS)]
        if not ordered:  # shards keep their own order
            found, expected = (sorted(side, key=np.ndarray.tobytes) for side in (found, expected))
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
    assert source.skipped == []


def test_folder_source_has_the_images(tree: Path) -> None:
    check_contents(open_source(tree))


def test_folder_with_splits_takes_train(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    root.mkdir()
    tree.rename(root / "train")
    (root / "val" / "other").mkdir(parents=True)
    check_contents(open_source(root))
    assert open_source(root / "train").classes == CLASSES


@pytest.mark.parametrize("stray", ["photos.tar.gz", "log.xz", "metadata.parquet", "old.tar"])
@pytest.mark.parametrize("below", ["", "train"])
def test_class_folders_are_preferred_to_other_files(
    tree: Path, tmp_path: Path, stray: str, below: str
) -> None:
    root = tree
    if below:
        root = tmp_path / "splits"
        root.mkdir()
        tree.rename(root / below)
    (root / stray).write_bytes(b"not even one")
    check_contents(open_source(root))


def test_folder_beside_shards_is_not_a_class(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    (folder / "previews").mkdir()
    (folder / "previews" / "0.png").write_bytes(png(pixels(0, 0)))
    check_contents(open_source(folder), ordered=False)


def test_class_may_be_called_train(tree: Path) -> None:
    (tree / "train").mkdir()
    (tree / "train" / "a.png").write_bytes(png(pixels(0, 0)))
    assert open_source(tree).classes == ("golden retriever", "lemon", "school bus", "train")


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")]
)
def test_tar_source_has_the_images(tmp_path: Path, suffix: str, mode: str) -> None:
    check_contents(open_source(make_tar(tmp_path / f"set{suffix}", mode)))


def test_tar_source_ignores_common_folders(tmp_path: Path) -> None:
    check_contents(open_source(make_tar(tmp_path / "set.tar", prefix="./some/set/train/")))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archive_ignores_hidden_members_and_keeps_the_later_of_two(
    tmp_path: Path, kind: str
) -> None:
    late = "lemon/001.png"
    stray = ("d/.ipynb_checkpoints/1.png", "lemon/.thumbs/x.png", ".cache/c/0.png")
    files = [(name, b"junk" if name == late else data) for name, data in members()]
    files += [(name, png(pixels(9, 9))) for name in (*stray, "__MACOSX/lemon/0.png")]
    files += [(f"./{late}" if kind == "tar" else late, dict(members())[late])]
    path = tmp_path / f"set.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile tells of the name that is there twice
            for name, data in files:
                archive.writestr(name, data)
    check_contents(open_source(path))


def test_zip_source_has_the_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members():
            archive.writestr(f"set/{name}", data)
    check_contents(open_source(tmp_path / "set.zip"))


def test_webdataset_is_read_from_a_folder_and_a_pattern(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    check_contents(open_source(folder), ordered=False)
    check_contents(open_source(f"{folder}/train-{{0000..0001}}.tar"), ordered=False)


def test_single_webdataset_shard_is_recognised(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    source = open_source(folder / "train-0000.tar")
    assert source.kind == "webdataset"
    assert sum(source.counts) == PER_CLASS * len(CLASSES) // 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_labels_equal_those_of_the_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = make_shards(tmp_path / "wds")
    theirs = webdataset.WebDataset(
        [str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False
    )
    labels = sorted(int(sample["cls"]) for sample in theirs)
    source = open_source(folder)
    assert labels == sorted(c for c, n in enumerate(source.counts) for _ in range(n))


@pytest.mark.usefixtures("hub_cache")
def test_parquet_source_has_the_images(tmp_path: Path) -> None:
    check_contents(open_source(make_parquet(tmp_path / "train-00000-of-00001.parquet")))


@pytest.mark.usefixtures("hub_cache")
def test_parquet_folder_source_has_the_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    check_contents(open_source(tmp_path))


@pytest.mark.usefixtures("hub_cache")
def test_hub_address_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    local = make_parquet(tmp_path / "x.parquet")
    asked = []

    def load_dataset(repo: str, **options: object) -> object:
        asked.append((repo, options))
        return datasets.Dataset.from_parquet(str(local))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_contents(open_source("hf://datasets/org/pets@abc"))
    assert asked == [("org/pets", {"split": "train", "revision": "abc"})]


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", json.dumps({"n00000001": "tench", "n00000002": "goldfish"})),
        ("names.json", json.dumps({"0": ["n00000001", "tench"], "1": ["n00000002", "goldfish"]})),
        ("names.json", json.dumps(["tench", "goldfish"])),
        ("names.csv", "wnid,name\nn00000001,tench\nn00000002,goldfish\n"),
        ("words.txt", "n00000001\ttench, Tinca tinca\nn00000002\tgoldfish, Carassius auratus\n"),
    ],
)
def test_wordnet_ids_are_named_by_a_table(tmp_path: Path, name: str, text: str) -> None:
    for wnid in ("n00000001", "n00000002"):
        (tmp_path / "set" / wnid).mkdir(parents=True)
        (tmp_path / "set" / wnid / "0.png").write_bytes(png(pixels(0, 0)))
    table = tmp_path / name
    table.write_text(text)
    assert open_source(tmp_path / "set", class_names=table).classes == ("tench", "goldfish")


def test_table_beside_the_folders_is_used(tmp_path: Path) -> None:
    for wnid in ("n00000001", "n00000002"):
        (tmp_path / "set" / wnid).mkdir(parents=True)
        (tmp_path / "set" / wnid / "0.png").write_bytes(png(pixels(0, 0)))
    (tmp_path / "words.txt").write_text("n00000001\ttench\nn00000002\tgoldfish\n")
    assert open_source(tmp_path / "set").classes == ("tench", "goldfish")


def test_two_classes_of_one_name_are_refused(tree: Path) -> None:
    table = {"golden_retriever": "crane", "lemon": "crane", "school_bus": "bus"}
    with pytest.raises(SourceError, match="two classes have the name 'crane'"):
        open_source(tree, class_names=table)


def test_class_without_a_name_is_refused(tree: Path) -> None:
    with pytest.raises(SourceError, match="2 classes have no name in the table"):
        open_source(tree, class_names={"lemon": "lemon"})


@pytest.mark.parametrize(
    "text",
    [
        '{"lemon": "a", "school_bus": "b", "lemon": "c"}',
        '{"0": ["lemon", "a"], "1": ["school_bus", "b"], "2": ["lemon", "c"]}',
    ],
)
def test_key_that_a_json_table_gives_two_names_is_refused(
    tree: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(SourceError, match="gives 'lemon' two names"):
        open_source(tree, class_names=tmp_path / "names.json")


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a": 3}', "5"])
def test_invalid_table_is_refused(tree: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(SourceError, match=r"names\.json is not a table"):
        open_source(tree, class_names=tmp_path / "names.json")


# -- fingerprint ------------------------------------------------------------------------------


def test_fingerprint_depends_on_contents_and_names(tree: Path) -> None:
    first = open_source(tree).fingerprint()
    os.utime(tree / "lemon" / "000.png", (1, 1))
    assert open_source(tree).fingerprint() == first
    path = tree / "lemon" / "000.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    changed = open_source(tree).fingerprint()
    assert changed != first
    path.rename(path.with_name("zzz.png"))
    renamed = open_source(tree).fingerprint()
    assert renamed not in {first, changed}
    named = {"golden_retriever": "dog", "lemon": "lemon", "school_bus": "bus"}
    assert open_source(tree, class_names=named).fingerprint() != renamed


def test_fingerprint_sees_both_ends_of_large_files(tree: Path) -> None:
    path = tree / "lemon" / "big.bmp"
    path.write_bytes(bytes(50_000))
    first = open_source(tree).fingerprint()
    for at in (0, 49_999):
        data = bytearray(50_000)
        data[at] = 1
        path.write_bytes(bytes(data))
        assert open_source(tree).fingerprint() != first


@pytest.mark.parametrize("kind", ["folder", "tree.tar", "shard.tar"])
def test_fingerprint_sees_the_middle_of_uncompressed_files(tmp_path: Path, kind: str) -> None:
    def written(ext: str, middle: int) -> str:
        data = bytearray(50_000)
        data[25_000] = middle
        files = {f"{c}/0.{ext}": bytes(data) for c in "ab"}
        if kind == "shard.tar":
            files = {
                f"{c}.{e}": d for c in "ab" for e, d in (("cls", c.encode()), (ext, bytes(data)))
            }
        path = tmp_path / ext / kind
        path.parent.mkdir(exist_ok=True)
        if kind == "folder":
            for name, content in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
        else:
            with tarfile.open(path, "w") as tar:
                for name, content in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return open_source(path).fingerprint()

    assert written("bmp", 0) != written("bmp", 1)
    assert written("png", 0) == written("png", 1)  # its ends would tell; published packs name them


# -- size -------------------------------------------------------------------------------------


SCAN = """
import resource, sys
from d3pack.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1])
assert sum(source.counts) == int(sys.argv[2]), source.counts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.heavy
def test_folder_source_uses_constant_memory(tmp_path: Path) -> None:
    seed = tmp_path / "seed.png"
    seed.write_bytes(png(pixels(0, 0)))
    for c in range(40):
        (tmp_path / "big" / f"class {c:03d}").mkdir(parents=True)
        for i in range(400):
            os.link(seed, tmp_path / "big" / f"class {c:03d}" / f"{i:05d}.png")
    tracemalloc.start()
    source = open_source(tmp_path / "big")
    for c in range(40):
        source.load(c, 399)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(source.counts) == 16_000
    assert peak < 2_000_000  # 16,000 names alone would be over 1 MB; four classes are kept
    done = subprocess.run(
        [sys.executable, "-c", SCAN, str(tmp_path / "big"), "16000"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 8_000  # kB


@pytest.mark.posix
@pytest.mark.parametrize("file", ["classes.json", ".classes.json"])
def test_a_table_that_is_a_link_out_of_the_folder_is_not_read(
    file: str, tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = open_source(tree).classes
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({key: f"token {key}" for key in keys}))
    (tree / file).symlink_to(secret)
    assert open_source(tree).classes == keys
    assert "leads out of its folder" in caplog.text


@pytest.mark.parametrize("file", ["classes.json", ".classes.json"])
def test_classes_json_in_the_folder_names_the_classes(file: str, tree: Path) -> None:
    keys = sorted(path.name for path in tree.iterdir())
    names = {key: f"name {i}" for i, key in enumerate(keys)}
    (tree / file).write_text(json.dumps({**names, "not decoded": "more"}))
    assert open_source(tree).classes == tuple(names.values())
    assert open_source(tree, class_names={key: key for key in keys}).classes == CLASSES


@pytest.mark.parametrize("text", ['{"other": "name"}', "[1, 2]", "{", '["a", "b"]'])
def test_a_classes_json_of_something_else_is_ignored(tree: Path, text: str) -> None:
    (tree / "classes.json").write_text(text)
    assert open_source(tree).classes == CLASSES


def test_a_classes_json_with_a_key_twice_is_not_used_and_said_so(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = CLASSES[0]
    (tree / "classes.json").write_text(f'{{"{key}": "one", "{key}": "two"}}')
    assert open_source(tree).classes == CLASSES
    assert caplog.messages == [
        "classes.json beside the images is not used: the table of class names gives"
        f" {key!r} two names"
    ]
