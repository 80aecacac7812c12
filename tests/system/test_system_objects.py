"""Objects in stores: the calls of a path, whole objects only, and failures as errors of d3pack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from object_stores import FaultyStore, failing

from d3pack.errors import D3MError, NotFoundError, StorageError, UsageError
from d3pack.system import ObjectFile, ObjectPath, is_url, place, replace_file, writing

DATA = bytes(range(256)) * 40
A = "faulty://bucket/folder/a.bin"


def refused(code: str) -> pytest.RaisesExc[D3MError]:
    return pytest.RaisesExc(D3MError, check=lambda error: error.code == code)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("s3://bucket/x.d3m", True),
        ("gs://bucket/x.d3m", True),
        ("abfs://box@account.dfs.core.windows.net/x.d3m", True),
        ("memory://x.d3m", True),
        ("hf://datasets/org/name/x.d3m", False),
        ("https://huggingface.co/datasets/org/name", False),
        ("file:///tmp/x.d3m", False),
        ("photos/x.d3m", False),
        ("C:\\photos", False),
        (Path("s3://bucket/x.d3m"), False),
    ],
)
def test_addresses_are_told_from_paths(value: str | Path, expected: bool) -> None:
    assert is_url(value) == expected
    assert isinstance(place(value), ObjectPath) == expected


def test_object_path_has_the_calls_of_a_path(faulty: type[FaultyStore]) -> None:
    path = place(A)
    assert isinstance(path, ObjectPath)
    assert (path.name, path.suffix, str(path.parent)) == ("a.bin", ".bin", "faulty://bucket/folder")
    assert path.parent / "a.bin" == path
    assert not path.exists()
    assert not path.parent.is_dir()
    with pytest.raises(NotFoundError):
        path.stat()
    replace_file(path, DATA)
    assert path.is_file()
    assert not path.is_dir()
    assert path.parent.is_dir()
    assert path.stat().st_size == len(DATA)
    with pytest.raises(NotFoundError):
        path.parent.stat()
    replace_file(path.parent / "b/c.txt", "ä".encode())
    assert (path.parent / "b/c.txt").read_text() == "ä"
    assert [(one.name, one.is_dir()) for one in path.parent.iterdir()] == [
        ("a.bin", False),
        ("b", True),
    ]


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3://bucket/a\n"])
def test_address_without_a_name_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected s3://bucket/name"):
        place(url)


def test_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        place("s3://key:hush@bucket/x.d3m")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "extra"), [("gs", "gs"), ("az", "az"), ("abfs", "az"), ("s3", "s3")]
)
def test_missing_package_is_named_with_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def without(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "get_filesystem_class", without)
    monkeypatch.setattr("d3pack.system.extras.import_module", without)
    with pytest.raises(UsageError, match=rf"pip install 'd3pack\[{extra}\]'"):
        place(f"{protocol}://bucket/x").read_bytes()


def test_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no package of fsspec opens other://"):
        place("other://bucket/x").read_bytes()


def test_ranges_are_read_and_counted(faulty: type[FaultyStore]) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    file = ObjectFile(ObjectPath(A))
    assert file.read(3, 5) == DATA[3:8]
    assert file.read(len(DATA) - 2, 100) == DATA[-2:]
    assert file.read(len(DATA), 5) == b""
    assert (file.size, file.requests, file.received) == (len(DATA), 2, 7)


def test_stream_seeks_and_reads_by_blocks(faulty: type[FaultyStore]) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    with ObjectPath(A).open(block=1 << 10) as stream:
        assert stream.read(10) == DATA[:10]
        assert stream.seek(-4, os.SEEK_END) == len(DATA) - 4
        assert stream.read() == DATA[-4:]
        stream.seek(5000)
        assert stream.read(3000) == DATA[5000:8000]


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError(), OSError(16, "SlowDown")]
)
def test_failures_of_the_moment_are_tried_again(
    faulty: type[FaultyStore], error: Exception
) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    for call in ("read", "info"):
        faulty.fault = failing(2, error, call)
        assert ObjectPath(A).read_bytes() == DATA
    faulty.fault = failing(2, error, "write")
    replace_file(ObjectPath(A), b"new")
    assert faulty.objects["bucket/folder/a.bin"] == b"new"
    faulty.fault = failing(3, error)
    with refused("E_STORAGE_BUSY"):
        ObjectPath(A).read_bytes()


def test_short_answers_are_read_again(faulty: type[FaultyStore]) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    short = iter([DATA[:7]])
    faulty.fault = staticmethod(lambda call, key: next(short, None) if call == "read" else None)
    assert ObjectPath(A).read_bytes() == DATA
    faulty.fault = staticmethod(lambda call, key: DATA[:7] if call == "read" else None)
    with refused("E_STORAGE_BUSY"):
        ObjectPath(A).read_bytes()


def test_object_that_shrinks_between_two_reads_is_refused(faulty: type[FaultyStore]) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    file = ObjectFile(ObjectPath(A))
    file.read(0, 8)
    file.check_unchanged()
    faulty.objects["bucket/folder/a.bin"] = DATA[:100]
    with refused("E_STORAGE_BYTES"):
        file.read(50, 200)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError("key AKIA123 may not"), "E_STORAGE_ACCESS"),
        (type("NoCredentialsError", (Exception,), {})("AKIA123"), "E_STORAGE_ACCESS"),
        (type("HttpError", (OSError,), {"code": 401})("AKIA123"), "E_STORAGE_ACCESS"),
        (type("HttpError", (OSError,), {"code": 503})("AKIA123"), "E_STORAGE_BUSY"),
        (type("HttpResponseError", (Exception,), {"status_code": 404})(), "E_NOT_FOUND"),
        (type("HttpResponseError", (Exception,), {"status_code": 412})(), "E_STORAGE_BYTES"),
        (FileNotFoundError("AKIA123"), "E_NOT_FOUND"),
        (ValueError("AKIA123"), "E_STORAGE"),
    ],
)
def test_failures_have_codes_and_repeat_nothing_secret(
    faulty: type[FaultyStore], error: Exception, code: str
) -> None:
    faulty.objects["bucket/folder/a.bin"] = DATA
    faulty.fault = failing(9, error)
    with refused(code) as caught:
        ObjectPath(A).read_bytes()
    assert "AKIA123" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_object_is_written_whole_or_not_at_all(faulty: type[FaultyStore]) -> None:
    path = ObjectPath(A)

    def fail_half_way() -> None:
        with writing(path) as temporary:
            folders.append(temporary.parent)
            temporary.write_bytes(b"half")
            raise RuntimeError

    folders: list[Path] = []
    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not path.exists()
    assert not folders[0].exists()
    with writing(path) as temporary:
        temporary.write_bytes(DATA)
        assert not path.exists()
    assert path.read_bytes() == DATA


@pytest.mark.e2e
def test_bucket_reads_and_writes(any_bucket: str, tmp_path: Path) -> None:
    path = place(f"{any_bucket}/deep/a#b %41.bin")
    assert isinstance(path, ObjectPath)
    assert not path.exists()
    replace_file(path, DATA)
    assert path.read_bytes() == DATA
    replace_file(place(f"{any_bucket}/deep/a#12"), b"a name, not a version")
    replace_file(place(f"{any_bucket}/deeper/a"), b"in a folder whose name begins alike")
    assert [one.name for one in path.parent.iterdir()] == ["a#12", path.name]
    assert {*path.parent.tree()} == {"a#12", path.name}
    file = ObjectFile(path)
    assert file.read(100, 7) == DATA[100:107]
    replace_file(path, DATA[::-1])  # as long as before: only the ETag tells
    with refused("E_STORAGE_BYTES"):
        file.read(100, 7)
    protocol = path.protocol
    for missing in (f"{any_bucket}/none", f"{protocol}://there-is-no-such-bucket/none"):
        with refused("E_NOT_FOUND"):
            place(missing).read_bytes()


@pytest.mark.e2e
def test_large_files_are_sent_in_parts(any_bucket: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 110
    path = place(f"{any_bucket}/large.bin")
    with writing(path) as temporary:
        temporary.write_bytes(data)
    assert isinstance(path, ObjectPath)
    assert path.stat().st_size == len(data)
    if path.protocol == "s3":
        assert "-" in path.stat().tag  # the mark of a multipart upload
    assert ObjectFile(path).read(70 << 20, 1 << 20) == data[: 1 << 20]


@pytest.mark.e2e
def test_s3_failures_are_errors(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fsspec

    def fresh() -> ObjectPath:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        return ObjectPath(f"{bucket}/x")

    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        with refused("E_STORAGE_ACCESS"):
            fresh().read_bytes()
    monkeypatch.setattr("d3pack.system.objects._ATTEMPTS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError) as caught:
        fresh().read_bytes()
    assert caught.value.code == "E_STORAGE_BUSY"
    assert "test-key" not in str(caught.value)


def test_an_object_that_is_replaced_during_a_download_is_read_again(
    faulty: type[FaultyStore], tmp_path: Path
) -> None:
    path, versions = ObjectPath(A), [DATA, DATA[::-1]]
    faulty.objects["bucket/folder/a.bin"] = DATA

    def replaced(times: int) -> None:
        left = [times]

        def fault(name: str, key: str) -> None:
            if name == "read" and left[0]:
                left[0] -= 1
                versions.reverse()
                faulty.objects[key] = versions[0]

        faulty.fault = staticmethod(fault)

    replaced(1)
    path.download(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == faulty.objects["bucket/folder/a.bin"] == DATA[::-1]
    replaced(1000)
    with refused("E_STORAGE_BYTES"):
        path.download(tmp_path / "b")
    with pytest.raises(NotFoundError):
        (path.parent / "none").download(tmp_path / "none")
