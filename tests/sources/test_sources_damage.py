"""Sources that are damaged or mean harm: named, skipped or refused, never a crash."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_world import CLASSES, make_parquet, make_shards, make_tar, pixels, png

from d3pack.errors import NotFoundError, SourceError
from d3pack.sources import open_source


def test_source_skips_and_records_bad_files(tree: Path) -> None:
    (tree / "lemon" / "000.png").write_bytes(b"junk")
    (tree / "lemon" / "notes.txt").write_text("not an image, not counted")
    source = open_source(tree)
    assert source.counts == (4, 4, 4)
    assert len(list(source.iter_class(1))) == 3
    assert [(s.class_name, s.key) for s in source.skipped] == [("lemon", "000.png")]
    list(source.iter_class(1))
    assert len(source.skipped) == 1


def test_source_raises_for_bad_files_on_demand(tree: Path) -> None:
    (tree / "lemon" / "000.png").write_bytes(b"junk")
    source = open_source(tree, on_error="fail")
    with pytest.raises(SourceError, match=r"lemon/000\.png.*or skip bad images"):
        list(source.iter_class(1))


@pytest.mark.posix
def test_source_skips_an_unreadable_file(tree: Path) -> None:
    path = tree / "lemon" / "001.png"
    path.unlink()
    path.mkdir()  # a folder of an image's name: root may read any file, so modes prove nothing
    fifo = tree / "lemon" / "002.png"
    fifo.unlink()
    os.mkfifo(fifo)
    source = open_source(tree)
    assert len(list(source.iter_class(1))) == 2
    assert [s.key for s in source.skipped] == ["002.png"]
    # a fingerprint that waits for the pipe's other end would wait here for ever
    code = "import sys; from d3pack.sources import open_source as o; o(sys.argv[1]).fingerprint()"
    subprocess.run([sys.executable, "-c", code, str(tree)], check=True, timeout=60)


def test_source_skips_a_file_that_was_deleted(tree: Path) -> None:
    source = open_source(tree)
    assert len(source.names(1)) == 4
    (tree / "lemon" / "002.png").unlink()
    assert source.get(1, 2) is None
    assert "regular" in source.skipped[0].reason


@pytest.mark.parametrize("empty", ["aardvark", "zebra"])
def test_empty_class_is_refused(tree: Path, empty: str) -> None:
    (tree / empty).mkdir()
    with pytest.raises(SourceError, match=f"class '{empty}' holds no image"):
        open_source(tree)


def test_single_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(pixels(0, 0)))
    with pytest.raises(SourceError, match="has 1 class;"):
        open_source(tmp_path)


def test_loose_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(pixels(0, 0)))
    with pytest.raises(SourceError, match="only loose images"):
        open_source(tmp_path)


def test_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip", "set.parquet", "set.rar"])
def test_damaged_container_is_refused(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    if name.endswith("parquet"):
        request.getfixturevalue("hub_cache")
    (tmp_path / name).write_bytes(b"this is no archive" * 100)
    with pytest.raises(SourceError):
        open_source(tmp_path / name)


def test_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError):
        open_source(path)


def test_links_that_lead_out_are_skipped(tree: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels(9, 9)))
    (tree / "lemon" / "link.png").symlink_to(secret)
    (tree / "lemon" / "inside.png").symlink_to(tree / "lemon" / "000.png")
    source = open_source(tree)
    assert source.counts == (4, 5, 4)
    assert [s.key for s in source.skipped] == ["link.png"]
    with pytest.raises(SourceError, match="leads out"):
        open_source(tree, on_error="fail")


def test_class_of_links_only_is_refused_with_the_reason(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(pixels(9, 9)))
    (tree / "zebra").mkdir()
    for i in range(2):
        (tree / "zebra" / f"{i}.png").symlink_to(tmp_path / "secret.png")
    match = "class 'zebra' holds no image; left out: 2, a link that leads out of the source; put"
    with pytest.raises(SourceError, match=match):
        open_source(tree)


def test_class_folder_that_leads_out_is_refused(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tree / "zebra").symlink_to(outside)
    with pytest.raises(SourceError, match="class folder 'zebra' is a link"):
        open_source(tree)


@pytest.mark.parametrize("what", ["folder", "shard", "file"])
def test_links_in_a_source_that_lead_out_are_refused(what: str, tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "given"
    root.mkdir()
    match what:
        case "folder":
            (root / "train").symlink_to(tree)
        case "shard":
            make_shards(tmp_path / "other")
            (root / "0.tar").symlink_to(next((tmp_path / "other").glob("*.tar")))
        case "file":
            pytest.importorskip("datasets")
            (root / "0.parquet").symlink_to(make_parquet(tmp_path / "other.parquet"))
    with pytest.raises(SourceError, match=f"{what} '.*' is a link that leads out of the source"):
        open_source(root)


def test_a_link_to_everything_is_not_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).symlink_to("/")
    monkeypatch.setattr(os, "walk", lambda top: pytest.fail(f"walks {top}"))
    with pytest.raises(SourceError, match="class folder 'cat' is a link"):
        open_source(tmp_path)


def test_links_beside_shards_are_no_class_folders(tmp_path: Path) -> None:
    root = make_shards(tmp_path / "shards")
    for name in ("cache", "logs"):
        (tmp_path / name).mkdir()
        (root / name).symlink_to(tmp_path / name)
    assert open_source(root).kind == "webdataset"


def test_braces_may_stand_for_folders(tmp_path: Path) -> None:
    made = sorted(make_shards(tmp_path / "shards").glob("*.tar"))
    for number, file in enumerate(made):
        (tmp_path / f"part-{number:02d}").mkdir()
        file.rename(tmp_path / f"part-{number:02d}" / "train.tar")
    source = open_source(f"{tmp_path}/part-{{00..{len(made) - 1:02d}}}/train.tar")
    assert sum(source.counts) > 0


def test_a_cache_of_the_hub_is_read_through_its_links(tree: Path, tmp_path: Path) -> None:
    repository = tmp_path / "datasets--org--photos"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(tree.rglob("*.png"))):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        link = snapshot / "train" / file.relative_to(tree)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    source = open_source(snapshot)
    assert source.classes == CLASSES
    assert not source.skipped
    (tmp_path / "secret.png").write_bytes(png(pixels(9, 9)))
    (snapshot / "train" / "lemon" / "link.png").symlink_to(tmp_path / "secret.png")
    assert [skip.key for skip in open_source(snapshot).skipped] == ["link.png"]


def test_archive_paths_that_lead_out_are_skipped(tmp_path: Path) -> None:
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


def test_tar_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d3pack.sources import archive

    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a/0.png")
        info.size = 8 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    monkeypatch.setattr(archive, "SLACK", 0)
    with pytest.raises(SourceError, match="grows beyond"):
        open_source(path)


@pytest.mark.parametrize(
    "edits",
    [{6: b"\xff\x00"}, {8: b"\x00\x08", 46: b"\x90"}, {46: b"\0"}],
    ids=["a version that nobody has", "a name that is not UTF-8", "an empty name"],
)
def test_zips_that_zipfile_fails_on_are_refused(tmp_path: Path, edits: dict[int, bytes]) -> None:
    """A fuzzer found three exceptions of zipfile that are not its own."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in ("cat/a.png", "dog/a.png"):
            archive.writestr(name, png(pixels(0, 0)))
    data = bytearray(whole.getvalue())
    entry = data.index(b"PK\x01\x02")  # of the first member, in the central directory
    for at, value in edits.items():
        data[entry + at : entry + at + len(value)] = value
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with pytest.raises(SourceError):
        open_source(path)
