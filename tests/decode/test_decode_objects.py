"""Exports into object stores: the files of a local export, complete ones only, and resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from object_stores import FaultyStore, any_bucket, faulty, store_servers
from tiny_backbones import tiny_pack, tiny_sd

import d3pack
from d3pack.decode import Decoder, ExportSettings, export_images
from d3pack.decode.settings import Layout
from d3pack.errors import StorageError, UsageError
from d3pack.system import ObjectPath, place

__all__ = ["any_bucket", "faulty", "store_servers"]
COUNT = 4
OUT = "faulty://bucket/out"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    path = tiny_sd(tmp_path_factory.mktemp("objects") / "sd")
    with Decoder(tiny_pack(path, images=COUNT), path=path) as decoder:
        yield decoder


def local(decoder: Decoder, folder: Path, layout: Layout) -> dict[str, bytes]:
    export_images(decoder, folder, ExportSettings(layout=layout))
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        f"bucket/out/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files
    }


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["folder", "webdataset", "parquet", "npz"])
def test_export_into_a_store_is_the_local_one_and_goes_on(
    faulty: type[FaultyStore], decoder: Decoder, tmp_path: Path, layout: Layout
) -> None:
    expected = local(decoder, tmp_path / "here", layout)
    before = 3 if layout == "folder" else 1  # objects of the first call, the mark among them

    def stop(call: str, key: str) -> None:
        if call == "write" and len(faulty.objects) == before:
            raise PermissionError

    faulty.fault = staticmethod(stop)
    with pytest.raises(StorageError):
        export_images(decoder, ObjectPath(OUT), ExportSettings(layout=layout))
    assert len(faulty.objects) == before
    assert faulty.objects.items() <= expected.items()
    faulty.fault = staticmethod(lambda call, key: None)
    done = export_images(decoder, ObjectPath(OUT), ExportSettings(layout=layout))
    assert faulty.objects == expected
    assert (done.images, done.decoded) == (3 * COUNT, 3 * COUNT - (layout == "folder"))
    faulty.calls.clear()
    again = export_images(decoder, ObjectPath(OUT), ExportSettings(layout=layout))
    assert again.decoded == 0
    assert faulty.calls.count("write") == (layout == "folder")  # .classes.json


def test_other_exports_and_other_objects_are_refused(
    faulty: type[FaultyStore], decoder: Decoder
) -> None:
    faulty.objects["bucket/mine/a.txt"] = b"mine"
    with pytest.raises(UsageError, match="faulty://bucket/mine is not empty"):
        export_images(decoder, ObjectPath("faulty://bucket/mine"), ExportSettings(layout="npz"))
    faulty.objects["bucket/out/.d3pack-export.json"] = b"{}"
    with pytest.raises(UsageError, match="faulty://bucket/out holds another export"):
        export_images(decoder, ObjectPath(OUT), ExportSettings(layout="npz"))
    assert len(faulty.objects) == 2


@pytest.mark.e2e
@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_export_to_a_bucket(
    any_bucket: str, decoder: Decoder, tmp_path: Path, layout: Layout
) -> None:
    expected = local(decoder, tmp_path / "here", layout)
    path = decoder.pack, tmp_path / "a.d3m"
    d3pack.write(*path)
    words: tuple[Any, ...] = ("--to", layout, "--backbone", tmp_path / "sd")
    tiny_sd(tmp_path / "sd")
    result = invoke("decode", path[1], "-o", f"{any_bucket}/out", "--device", "cpu", *words)
    assert result.exit_code == 0, result.stderr
    for name, data in expected.items():
        where = place(f"{any_bucket}/{name.removeprefix('bucket/')}")
        assert where.read_bytes() == data
