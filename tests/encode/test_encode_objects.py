"""A pack that is written to an object store: the same bytes, and work that is kept beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import Result, invoke
from encode_world import make_tree
from object_stores import FaultyStore, any_bucket, failing, faulty, store_servers

from d3pack.format import read

__all__ = ["any_bucket", "faulty", "store_servers"]
URL = "faulty://bucket/sets/made.d3m"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_tree(tmp_path / "photos", count=2)


def code(source: Path, output: object, *more: str) -> Result:
    words = ("--bytes-per-image", "3", "--device", "cpu", "--format", "quiet")
    return invoke("code", source, "-o", output, *words, *more)


@pytest.mark.heavy
def test_code_writes_the_same_pack_to_a_store(
    faulty: type[FaultyStore], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code(photos, tmp_path / "here.d3m").exit_code == 0
    faulty.fault = failing(9, PermissionError(), "write")
    refused = code(photos, URL)
    assert refused.exception is not None
    assert refused.exception.code == "E_STORAGE_ACCESS"
    assert not faulty.objects  # before any work

    def no_packs(call: str, key: str) -> None:
        if call == "write" and key.endswith(".d3m"):
            raise PermissionError

    faulty.fault = staticmethod(no_packs)
    refused = code(photos, URL)
    assert refused.exception is not None
    assert refused.exception.code == "E_STORAGE_ACCESS"
    work = {name for name in faulty.objects if name.startswith("bucket/sets/made.d3m.work/")}
    assert {*faulty.objects} == work  # what was made is kept, but no lease
    assert not any(name.endswith(("/lease", "/lock")) for name in work)
    assert sum("/codes/" in name for name in work) == 3
    # another machine: it codes nothing, and the store fails now and then
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr("d3pack.encode.codes.Coder", None)
        faulty.fault = failing(2, TimeoutError(), "write")
        assert code(photos, URL).exit_code == 0
    assert faulty.objects["bucket/sets/made.d3m"] == (tmp_path / "here.d3m").read_bytes()
    left = {name.partition(".d3m.work/")[2] for name in faulty.objects} - {""}
    assert {"journal.json", "log.txt"} < left
    assert not any(name.startswith("codes/") for name in left)
    assert not list(tmp_path.glob("**/made.d3m.work"))
    faulty.calls.clear()
    before = faulty.objects["bucket/sets/made.d3m"]
    assert code(photos, URL).exit_code == 0  # finished: read back, and nothing to do
    assert faulty.objects["bucket/sets/made.d3m"] is before
    other = code(make_tree(tmp_path / "more", count=3), URL, "--restart")
    assert other.exit_code == 2
    assert "made.d3m exists" in other.stderr


def test_outputs_that_stay_here_refuse_addresses(photos: Path) -> None:
    pack = Path(__file__).parents[2] / "examples" / "cifar10.d3m"
    for words in (
        ("preview", pack, "-o", "s3://bucket/sheet.png"),
        ("export-embeddings", pack, "-o", URL),
    ):
        result = invoke(*words)
        assert result.exit_code == 2
        assert "expected a path" in result.stderr
    assert code(photos, "s3://bucket/name").exit_code == 2


@pytest.mark.e2e
def test_code_writes_to_a_bucket(any_bucket: str, photos: Path) -> None:
    url = f"{any_bucket}/sets/made.d3m"
    assert code(photos, url).exit_code == 0
    assert invoke("verify", url).exit_code == 0
    assert code(photos, "here.d3m").exit_code == 0
    assert invoke("diff", url, "here.d3m").exit_code == 0
    assert len(read("here.d3m")) == 6
