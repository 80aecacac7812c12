"""Sources: every container gives the same classes and pixels; damage is named, never a crash."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources import BadImageError, Source, open_source
from d3pack.sources import images as images_module
from d3pack.sources.images import decode

CLASSES = ("golden retriever", "lemon", "school bus")
PER_CLASS = 4


def pixels(c: int, i: int) -> np.ndarray:
    return np.random.default_rng(10 * c + i).integers(0, 256, (9, 11, 3), dtype=np.uint8)


def png(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


def members() -> list[tuple[str, bytes]]:
    return [
        (f"{name.replace(' ', '_')}/{i:03d}.png", png(pixels(c, i)))
        for c, name in enumerate(CLASSES)
        for i in range(PER_CLASS)
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in members():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_tar(path: Path, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(folder: Path) -> Path:
    folder.mkdir()
    samples = [(c, i) for i in range(PER_CLASS) for c in range(len(CLASSES))]
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for c, i in samples[shard::2]:
                parts = {"cls": str(c).encode(), "png": png(pixels(c, i))}
                for ext, data in parts.items():
                    info = tarfile.TarInfo(f"{i}{c:05d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    return folder


def make_parquet(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    order = [(c, i) for i in range(PER_CLASS) for c in range(len(CLASSES))]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"bytes": png(pixels(c, i)), "path": None} for c, i in order],
        "label": [c for c, _ in order],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


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


def test_folder(tree: Path) -> None:
    check_contents(open_source(tree))


def test_folder_with_splits_takes_train(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    root.mkdir()
    tree.rename(root / "train")
    (root / "val" / "other").mkdir(parents=True)
    check_contents(open_source(root))
    assert open_source(root / "train").classes == CLASSES


def test_train_is_also_a_vehicle(tree: Path) -> None:
    (tree / "train").mkdir()
    (tree / "train" / "a.png").write_bytes(png(pixels(0, 0)))
    assert open_source(tree).classes == ("golden retriever", "lemon", "school bus", "train")


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")]
)
def test_tar(tmp_path: Path, suffix: str, mode: str) -> None:
    check_contents(open_source(make_tar(tmp_path / f"set{suffix}", mode)))


def test_tar_below_common_folders(tmp_path: Path) -> None:
    check_contents(open_source(make_tar(tmp_path / "set.tar", prefix="./some/set/train/")))


def test_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members():
            archive.writestr(f"set/{name}", data)
    check_contents(open_source(tmp_path / "set.zip"))


def test_webdataset_folder_and_pattern(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    check_contents(open_source(folder), ordered=False)
    check_contents(open_source(f"{folder}/train-{{0000..0001}}.tar"), ordered=False)


def test_one_webdataset_shard_is_recognised(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    source = open_source(folder / "train-0000.tar")
    assert source.kind == "webdataset"
    assert sum(source.counts) == PER_CLASS * len(CLASSES) // 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_is_what_the_library_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = make_shards(tmp_path / "wds")
    theirs = webdataset.WebDataset(
        [str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False
    )
    labels = sorted(int(sample["cls"]) for sample in theirs)
    source = open_source(folder)
    assert labels == sorted(c for c, n in enumerate(source.counts) for _ in range(n))


@pytest.mark.usefixtures("hub_cache")
def test_parquet(tmp_path: Path) -> None:
    check_contents(open_source(make_parquet(tmp_path / "train-00000-of-00001.parquet")))


@pytest.mark.usefixtures("hub_cache")
def test_parquet_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    check_contents(open_source(tmp_path))


@pytest.mark.usefixtures("hub_cache")
def test_hub_address_goes_through_load_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_wordnet_names(tmp_path: Path, name: str, text: str) -> None:
    for wnid in ("n00000001", "n00000002"):
        (tmp_path / "set" / wnid).mkdir(parents=True)
        (tmp_path / "set" / wnid / "0.png").write_bytes(png(pixels(0, 0)))
    table = tmp_path / name
    table.write_text(text)
    assert open_source(tmp_path / "set", class_names=table).classes == ("tench", "goldfish")


def test_a_table_beside_the_tree_is_found(tmp_path: Path) -> None:
    for wnid in ("n00000001", "n00000002"):
        (tmp_path / "set" / wnid).mkdir(parents=True)
        (tmp_path / "set" / wnid / "0.png").write_bytes(png(pixels(0, 0)))
    (tmp_path / "words.txt").write_text("n00000001\ttench\nn00000002\tgoldfish\n")
    assert open_source(tmp_path / "set").classes == ("tench", "goldfish")


def test_two_classes_of_one_name(tree: Path) -> None:
    table = {"golden_retriever": "crane", "lemon": "crane", "school_bus": "bus"}
    with pytest.raises(SourceError, match="two classes have the name 'crane'"):
        open_source(tree, class_names=table)


def test_a_class_without_a_name(tree: Path) -> None:
    with pytest.raises(SourceError, match="2 classes have no name in the table"):
        open_source(tree, class_names={"lemon": "lemon"})


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a": 3}', "5"])
def test_a_broken_table(tree: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(SourceError, match=r"names\.json is not a table"):
        open_source(tree, class_names=tmp_path / "names.json")


# -- images of every sort ---------------------------------------------------------------------


def grey_ramp() -> np.ndarray:
    return np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_sixteen_bit_grey_keeps_its_range() -> None:
    image = decode(saved(Image.fromarray(grey_ramp()), "PNG"))
    assert image.mode == "RGB"
    expected = np.rint(grey_ramp() / 257.0).astype(np.uint8)
    assert np.array_equal(np.asarray(image)[..., 0], expected)


def test_sixteen_bit_tiff() -> None:
    found = np.asarray(decode(saved(Image.fromarray(grey_ramp()), "TIFF")))
    assert found.max() == 251
    assert found.min() == 0


def test_cmyk() -> None:
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    found = np.asarray(decode(saved(red.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(found - [250, 10, 10]).max() < 12


def test_grey_and_palette() -> None:
    grey = Image.fromarray(pixels(0, 0)[..., 0])
    assert np.array_equal(np.asarray(decode(saved(grey, "PNG")))[..., 1], np.asarray(grey))
    assert decode(saved(Image.fromarray(pixels(0, 0)).quantize(16), "PNG")).mode == "RGB"


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.asarray(decode(saved(clear, "PNG"))).min() == 255


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.new("RGB", (4, 8)), "JPEG", exif=exif)).size == (8, 4)


def huge_png(width: int, height: int) -> bytes:
    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    start = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(start) + chunk(b"IDAT" + zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png(pixels(0, 0))[:-80], "."),
        (huge_png(100_000, 100_000), "over the limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
    ids=["empty", "text", "truncated", "bomb", "postscript"],
)
def test_bad_bytes(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_a_file_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_BYTES", 10)
    with pytest.raises(BadImageError, match="over the limit of 10"):
        decode(png(pixels(0, 0)))


# -- bad trees --------------------------------------------------------------------------------


def test_bad_files_are_skipped_and_recorded(tree: Path) -> None:
    (tree / "lemon" / "000.png").write_bytes(b"junk")
    (tree / "lemon" / "notes.txt").write_text("not an image, not counted")
    source = open_source(tree)
    assert source.counts == (4, 4, 4)
    assert len(list(source.iter_class(1))) == 3
    assert [(s.class_name, s.key) for s in source.skipped] == [("lemon", "000.png")]
    list(source.iter_class(1))
    assert len(source.skipped) == 1


def test_bad_files_fail_on_demand(tree: Path) -> None:
    (tree / "lemon" / "000.png").write_bytes(b"junk")
    source = open_source(tree, on_error="fail")
    with pytest.raises(SourceError, match=r"lemon/000\.png.*--on-error skip"):
        list(source.iter_class(1))


def test_unreadable_file(tree: Path) -> None:
    path = tree / "lemon" / "001.png"
    path.unlink()
    path.mkdir()  # a folder of an image's name: root may read any file, so modes prove nothing
    fifo = tree / "lemon" / "002.png"
    fifo.unlink()
    os.mkfifo(fifo)
    source = open_source(tree)
    assert len(list(source.iter_class(1))) == 2
    assert [s.key for s in source.skipped] == ["002.png"]


def test_a_file_that_vanishes(tree: Path) -> None:
    source = open_source(tree)
    assert len(source.names(1)) == 4
    (tree / "lemon" / "002.png").unlink()
    assert source.get(1, 2) is None
    assert "regular" in source.skipped[0].reason


@pytest.mark.parametrize("empty", ["aardvark", "zebra"])
def test_empty_class(tree: Path, empty: str) -> None:
    (tree / empty).mkdir()
    with pytest.raises(SourceError, match=f"class '{empty}' holds no image"):
        open_source(tree)


def test_one_class(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(pixels(0, 0)))
    with pytest.raises(SourceError, match="has 1 class;"):
        open_source(tmp_path)


def test_loose_images(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(pixels(0, 0)))
    with pytest.raises(SourceError, match="only loose images"):
        open_source(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip", "set.parquet", "set.rar"])
def test_damaged_containers(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    if name.endswith("parquet"):
        request.getfixturevalue("hub_cache")
    (tmp_path / name).write_bytes(b"this is no archive" * 100)
    with pytest.raises(SourceError):
        open_source(tmp_path / name)


def test_truncated_tar(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError):
        open_source(path)


def test_links_out_of_the_source(tree: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels(9, 9)))
    (tree / "lemon" / "link.png").symlink_to(secret)
    (tree / "lemon" / "inside.png").symlink_to(tree / "lemon" / "000.png")
    source = open_source(tree)
    assert source.counts == (4, 5, 4)
    assert [s.key for s in source.skipped] == ["link.png"]
    with pytest.raises(SourceError, match="leads out"):
        open_source(tree, on_error="fail")


def test_class_folder_that_links_out(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tree / "zebra").symlink_to(outside)
    with pytest.raises(SourceError, match="class folder 'zebra' is a link"):
        open_source(tree)


def test_archive_paths_that_lead_out(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar")
    with tarfile.open(path, "a") as tar:
        for name in ("../evil/0.png", "/etc/evil/0.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("lemon/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(path)
    assert source.classes == CLASSES
    assert len(source.skipped) == 3


def test_tar_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d3pack.sources import archive

    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a/0.png")
        info.size = 8 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    monkeypatch.setattr(archive, "SLACK", 0)
    with pytest.raises(SourceError, match="grows beyond"):
        open_source(path)


# -- fingerprint ------------------------------------------------------------------------------


def test_fingerprint_follows_the_contents(tree: Path) -> None:
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


# -- size -------------------------------------------------------------------------------------

SCAN = """
import resource, sys
from d3pack.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1])
assert sum(source.counts) == int(sys.argv[2]), source.counts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_of_a_folder_source_does_not_grow_with_the_set(tmp_path: Path) -> None:
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
