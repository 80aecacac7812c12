"""Object stores for tests: the server of moto, which speaks S3, and one that fails on demand."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The server program, started once a process."""
    reason = "needs moto and s3fs: pip install '.[test]'"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, with credentials for it in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    name = f"b{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    kind.clear_instance_cache()


class FaultyStore(AbstractFileSystem):  # type: ignore[misc]
    """Objects in memory. `fault` sees each call before it is answered, and may answer itself."""

    protocol = "faulty"
    objects: ClassVar[dict[str, bytes]] = {}
    calls: ClassVar[list[str]] = []
    fault: ClassVar[Callable[[str, str], bytes | None]] = staticmethod(lambda call, key: None)
    lock = threading.Lock()

    def _meet(self, call: str, path: str) -> bytes | None:
        with self.lock:
            self.calls.append(call)
            return type(self).fault(call, self._strip_protocol(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = self._strip_protocol(path)
        self._meet("info", key)
        if key in self.objects:
            return self._row(key)
        if any(name.startswith(f"{key}/") for name in self.objects):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _row(self, key: str) -> dict[str, Any]:
        data = self.objects[key]
        return {"name": key, "size": len(data), "type": "file", "ETag": str(hash(data))}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        key = self._strip_protocol(path)
        self._meet("ls", key)
        below = [name[len(key) + 1 :] for name in self.objects if name.startswith(f"{key}/")]
        rows = [self._row(f"{key}/{name}") for name in below if "/" not in name]
        folders = {name.partition("/")[0] for name in below if "/" in name}
        rows += [{"name": f"{key}/{name}", "size": 0, "type": "directory"} for name in folders]
        return rows if detail else [row["name"] for row in rows]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        key = self._strip_protocol(path)
        answer = self._meet("read", key)
        return self.objects[key][start:end] if answer is None else answer

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        key = self._strip_protocol(path)
        self._meet("write", key)
        self.objects[key] = bytes(value)

    def rm_file(self, path: str) -> None:
        key = self._strip_protocol(path)
        self._meet("remove", key)
        if self.objects.pop(key, None) is None:
            raise FileNotFoundError(path)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[FaultyStore]:
    """The class behind `faulty://`, empty and without faults; waiting takes no time."""
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    monkeypatch.setattr(FaultyStore, "objects", {})
    monkeypatch.setattr(FaultyStore, "calls", [])
    monkeypatch.setattr(FaultyStore, "fault", staticmethod(lambda call, key: None))
    monkeypatch.setattr("d3pack.system.objects._WAIT", 0)
    return FaultyStore


def failing(times: int, error: Exception, call: str = "read") -> Callable[[str, str], None]:
    """A fault: the next calls of a kind raise an error."""
    left = [times]

    def fault(name: str, key: str) -> None:
        if name == call and left[0]:
            left[0] -= 1
            raise error

    return staticmethod(fault)
