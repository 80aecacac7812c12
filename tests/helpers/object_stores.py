"""Object stores for tests: server programs that speak S3 and what Google's and Azure's clients
speak, and a store in memory that fails on demand."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server of moto."""
    reason = "needs moto and s3fs: pip install '.[test]'"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.stop()


@contextmanager
def gs_server() -> Iterator[dict[str, str]]:
    """Start gcp-storage-emulator."""
    reason = "needs gcp-storage-emulator and gcsfs: pip install '.[test]'"
    # or gcsfs asks for the kind of each bucket by gRPC, which the emulator does not speak
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs", reason=reason)
    pytest.importorskip("gcp_storage_emulator", reason=reason)
    port = free_port()
    words = ["-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    with running([sys.executable, *words, "--in-memory", "--quiet"], port):
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
        }


@contextmanager
def az_server() -> Iterator[dict[str, str]]:
    """Start Azurite."""
    pytest.importorskip("adlfs", reason="needs adlfs: pip install '.[az]'")
    program = os.environ.get("D3PACK_AZURITE") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs azurite-blob on PATH or in D3PACK_AZURITE: npm install -g azurite")
    port, (name, key) = free_port(), ("test", "dGVzdC1rZXk=")
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    accounts = {**os.environ, "AZURITE_ACCOUNTS": f"{name}:{key}"}
    with running([program, "--blobPort", str(port), *options], port, accounts):
        yield {
            "AZURE_STORAGE_CONNECTION_STRING": f"AccountName={name};AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{name};"
        }


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(words: list[str], port: int, environ: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server program, from when it answers on its port."""
    with subprocess.Popen(
        words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            end = time.monotonic() + 60
            while not answers(port):
                assert process.poll() is None, f"{words[0]} ended with {process.returncode}"
                assert time.monotonic() < end, f"{words[0]} does not answer"
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def answers(port: int) -> bool:
    """Return whether something listens on a port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


SERVERS = {"s3": s3_server, "gs": gs_server, "az": az_server}
Servers = Callable[[str], dict[str, str]]


@pytest.fixture(scope="session")
def store_servers() -> Iterator[Servers]:
    """Start the server program of a protocol, once a process; return what leads clients to it."""
    with ExitStack() as stack:
        yield cache(lambda protocol: stack.enter_context(SERVERS[protocol]()))


@pytest.fixture
def bucket(store_servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket on S3, with credentials for it in the environment."""
    with new_bucket("s3", store_servers, monkeypatch) as url:
        yield url


@pytest.fixture(params=[*SERVERS])
def any_bucket(
    request: pytest.FixtureRequest, store_servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of an empty bucket of each kind of store, as `bucket` is of S3."""
    with new_bucket(request.param, store_servers, monkeypatch) as url:
        yield url


@contextmanager
def new_bucket(protocol: str, servers: Servers, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make an empty bucket, and let this process and its children find it."""
    for name, value in servers(protocol).items():
        patch.setenv(name, value)
        if name.startswith("FSSPEC_"):  # which was read at the import
            _, section, key = name.lower().split("_")
            patch.setitem(fsspec.config.conf, section, {key: value})
    kind = fsspec.get_filesystem_class(protocol)
    kind.clear_instance_cache()
    name = f"b{uuid.uuid4().hex}"
    fsspec.filesystem(protocol).mkdir(name)
    yield f"{protocol}://{name}"
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
