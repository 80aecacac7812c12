"""Objects in stores that fsspec opens: `s3://`, `gs://`, `az://` and the like.

`ObjectPath` has those calls of `pathlib.Path` that d3pack makes, so that packs, exports and sources
need not know where they are. An object is written by one request or one multipart upload: under its
name there is the old one or the new one, never a part.
"""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, Any, NamedTuple, TypeVar, cast

from d3pack.errors import D3MError, NotFoundError, StorageError, UsageError
from d3pack.system.extras import require

T = TypeVar("T")

# the Hub has protocols of its own, and a file is a path
_URL = re.compile(r"(?!(?:hf|https?|file|local)://)[a-z][a-z0-9+.-]*://", re.ASCII)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(
    ("az", "abfs", "abfss"), "adlfs"
)
_PINNED = {"s3fs"}  # with the ETag of its first answer it asks for each range
_ATTEMPTS = 3  # of a call that fails for the moment; clients retry below that, too
_WAIT = 0.2  # seconds before the second attempt; four times as long before the next
_BLOCK = 1 << 22  # bytes of one request when an object is read from its beginning
_READS = 5  # of an object that is replaced each time
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "created")
_BUSY = {
    getattr(errno, name, errno.EBUSY)
    for name in ("EBUSY", "EREMOTEIO", "EIO", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH")
}
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # numbers of a full disk
_NETWORK = {"aiohttp", "urllib3", "requests", "httpx"}


def is_url(value: object) -> bool:
    """Return whether this is the address of an object: `protocol://...`, and not of the Hub."""
    return isinstance(value, str) and _URL.match(value) is not None


def place(value: str | os.PathLike[str] | ObjectPath) -> Path | ObjectPath:
    """Return where something is: an `ObjectPath` for an address, else a `Path`."""
    if isinstance(value, ObjectPath):
        return value
    return ObjectPath(str(value)) if is_url(value) else Path(value)


class ObjectInfo(NamedTuple):
    """What a store says about an object or a folder."""

    st_size: int
    tag: str  # changes with the bytes: an ETag, or what else the store has
    folder: bool


class ObjectPath:
    """A place in an object store, with calls of `pathlib.Path`.

    Raises:
        UsageError: the address has a password or no name, or its package is not installed.
        NotFoundError: there is no such object, where a call needs it.
        StorageError: the store cannot be reached, refuses, or answers something else.
    """

    __slots__ = ("_listed", "_rest", "protocol")

    def __init__(self, url: str, listed: ObjectInfo | None = None) -> None:
        self.protocol, _, rest = url.partition("://")
        if ":" in rest.partition("/")[0].rpartition("@")[0]:
            # not repeated in the message
            raise UsageError(
                f"the {self.protocol}:// address holds a password",
                hint="remove it: credentials come from the environment or the store's own files",
            )
        self._rest = rest.strip("/")
        if not self._rest or not url.isprintable():
            raise UsageError(f"invalid address {url!r}: expected {self.protocol}://bucket/name")
        self._listed = listed

    def __str__(self) -> str:
        return f"{self.protocol}://{self._rest}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self._rest)

    @property
    def _package(self) -> str | None:
        return _PACKAGES.get(self.protocol)

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return self._pure.suffix

    @property
    def parent(self) -> ObjectPath:
        """The folder; a bucket is its own."""
        folder = self._rest.rpartition("/")[0]
        return ObjectPath(f"{self.protocol}://{folder}") if folder else self

    def info(self) -> ObjectInfo | None:
        """Return what the store says now; None where there is nothing."""
        try:
            return _info(self._call(lambda store, key: store.info(key)))
        except NotFoundError:
            return None

    def _known(self) -> ObjectInfo | None:
        return self._listed or self.info()

    def stat(self) -> ObjectInfo:
        """Return size and tag of an object."""
        info = self._known()
        if info is None or info.folder:
            raise _missing(self)
        return info

    def exists(self) -> bool:
        """Return whether there is an object or a folder."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Return whether it is an object."""
        info = self._known()
        return info is not None and not info.folder

    def is_dir(self) -> bool:
        """Return whether objects lie below it."""
        info = self._known()
        return info is not None and info.folder

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the objects and folders of a folder, by name."""
        rows = self._call(lambda store, key: store.ls(key, detail=True))
        for row in sorted(rows, key=lambda row: str(row["name"])):
            name = str(row["name"]).rstrip("/").rpartition("/")[2]
            own = str(row["name"]).strip("/") == self._rest  # a mark of some clients for folders
            if name.isprintable() and not own:
                yield ObjectPath(f"{self}/{name}", _info(row))

    def mkdir(self, **_: bool) -> None:
        """Do nothing: folders of objects need not be made."""

    def open(self, mode: str = "rb", *, block: int = _BLOCK) -> IO[bytes]:
        """Return a seekable stream that reads by blocks."""
        return ObjectFile(self).stream(block)

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        file = ObjectFile(self)
        return file.read(0, file.size)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Replace the object; it is never seen half-written."""
        self._call(lambda store, key: store.pipe_file(key, data))

    def upload(self, file: Path) -> None:
        """Replace the object by the bytes of a file; large ones are sent in parts."""
        self._call(lambda store, key: store.put_file(str(file), key))

    def download(self, file: Path) -> None:
        """Write the whole object, all of one version, to a file.

        Clients read large objects by ranges, each of the version that is there then; so an object
        that was replaced meanwhile is read again.

        Raises:
            StorageError: it was replaced time and again (E_STORAGE_BYTES).
        """
        for _ in range(_READS):
            before = self.stat()
            self._call(lambda store, key: store.get_file(key, str(file)))
            if self.info() == before:
                return
        raise _changed(self)

    def unlink(self) -> None:
        """Remove the object; it need not be there."""
        with suppress(NotFoundError):
            self._call(lambda store, key: store.rm_file(key))

    def modified(self) -> float:
        """Return when the object was written, in seconds of the store's clock."""
        return float(self._call(lambda store, key: store.modified(key).timestamp()))

    def tree(self) -> dict[str, ObjectInfo]:
        """Return all objects below a folder, by their names relative to it."""
        try:
            rows = self._call(lambda store, key: store.find(key, detail=True))
        except NotFoundError:
            return {}
        below, (_, key) = {}, self.resolve()
        for name, row in rows.items():
            front, _, rest = name.partition(f"{key}/")
            mark = rest.endswith("/")  # of some clients, for a folder
            if not front and rest and not mark and rest.isprintable():
                below[rest] = _info(row)
        return below

    def _call(self, action: Callable[[Any, str], T]) -> T:
        return _retried(self, lambda: action(*self.resolve()))

    def resolve(self) -> tuple[Any, str]:
        """Return the file system of fsspec, which belongs to this process, and the name in it."""
        import fsspec

        try:
            kind = fsspec.get_filesystem_class(self.protocol)
            # listings are not kept: others write to the store, too
            options = {"use_listings_cache": False, **kind._get_kwargs_from_urls(str(self))}
            if self._package == "gcsfs":  # `#12` belongs to the name, and is not a generation
                options.pop("version_aware", None)
            return fsspec.filesystem(self.protocol, **options), kind._strip_protocol(str(self))
        except ImportError as error:
            if self._package:
                require(self._package, f"{self.protocol}://")
            raise UsageError(f"{self.protocol}:// cannot be used: {error}") from None
        except ValueError:
            raise UsageError(
                f"no package of fsspec opens {self.protocol}://",
                hint="write s3://, gs:// or az://, or the path of a local file",
            ) from None


class ObjectFile:
    """An object that is read by ranges, all of one version where the store can tell versions.

    Attributes:
        size: bytes of the object.
        tag: of the version that is read.
        requests: how many ranges were asked for.
        received: how many bytes came.
    """

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._pinned = path._package in _PINNED
        self.requests = self.received = 0
        self._process, self._file, self._lock = 0, cast(Any, None), Lock()
        self.size, self.tag, folder = _retried(path, self._open)
        if folder:
            raise _missing(path)

    def _open(self) -> ObjectInfo:
        store, key = self.path.resolve()
        self._file = store.open(key, "rb", cache_type="none")
        self._process = os.getpid()
        return _info(getattr(self._file, "details", None) or store.info(key))

    def stream(self, block: int = _BLOCK) -> IO[bytes]:
        """Return a seekable stream that reads by blocks."""
        return cast(IO[bytes], io.BufferedReader(cast(Any, _Stream(self)), block))

    def read(self, begin: int, length: int) -> bytes:
        """Return the bytes from `begin` on, fewer than `length` only at the end."""
        expected = max(0, min(length, self.size - begin))
        return _retried(self.path, lambda: self._read(begin, expected)) if expected else b""

    def _read(self, begin: int, length: int) -> bytes:
        if self._process != os.getpid():  # connections do not outlive a fork
            self._check(self._open())
        with self._lock:
            self.requests += 1
            self._file.seek(begin)
            data = bytes(self._file.read(length))
            self.received += len(data)
        if len(data) != length:
            self.check_unchanged()
            raise StorageError(
                f"{self.path}: {len(data)} of {length} bytes arrived",
                code="E_STORAGE_BUSY",
                hint="run it again",
            )
        if not self._pinned:  # asked for afterwards, it tells of which version the bytes are
            self.check_unchanged()
        return data

    def check_unchanged(self) -> None:
        """Raise `StorageError` if the object is another one now."""
        self._check(self.path.info())

    def _check(self, info: ObjectInfo | None) -> None:
        if info is None or (info.st_size, info.tag) != (self.size, self.tag):
            raise _changed(self.path)


class _Stream(io.RawIOBase):
    """An `ObjectFile` as a raw stream."""

    def __init__(self, file: ObjectFile) -> None:
        self._source, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._source.size)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _info(row: Any) -> ObjectInfo:
    tags = (str(row[name]) for name in _TAGS if row.get(name) is not None)
    tag = next(tags, "") or str(row.get("LastModified", row.get("updated", "")))
    # quotes belong to the header, and not every listing has them
    return ObjectInfo(int(row.get("size") or 0), tag.strip('"'), row.get("type") == "directory")


def _retried(path: ObjectPath, call: Callable[[], T]) -> T:
    """Call a store, and again where it fails for the moment."""
    for attempt in range(_ATTEMPTS):
        try:
            with _calls(path):
                return call()
        except StorageError as error:
            if error.code != "E_STORAGE_BUSY" or attempt + 1 == _ATTEMPTS:
                raise
            time.sleep(_WAIT * 4**attempt)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def _calls(path: ObjectPath) -> Iterator[None]:
    """Run calls to a store; failures are raised as errors of d3pack."""
    try:
        yield
    except D3MError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in FULL:  # the disk here, to which an object is fetched
            raise
        raise _translated(error, path) from error


def _missing(path: ObjectPath) -> NotFoundError:
    return NotFoundError(f"there is no object {path}", hint="check bucket and name")


def _changed(path: ObjectPath) -> StorageError:
    return StorageError(
        f"{path} changed while it was read", code="E_STORAGE_BYTES", hint="run it again"
    )


def _translated(error: Exception, path: ObjectPath) -> D3MError:
    """Return the error of d3pack; texts of clients are left out, as they may hold credentials."""
    status, kind = _status(error), type(error).__name__
    if status == 404 or isinstance(error, FileNotFoundError | IsADirectoryError):
        return _missing(path)
    credentials = "Credential" in kind or "Auth" in kind
    if status in (401, 403) or isinstance(error, PermissionError) or credentials:
        return StorageError(
            f"{path}: access is refused, or there are no credentials ({kind})",
            code="E_STORAGE_ACCESS",
            hint="check the credentials in the environment or in the store's own files",
        )
    if status in (412, 416) or kind == "FileExpired":
        return _changed(path)
    if status in (408, 429) or status >= 500 or (not status and _is_network(error)):
        return StorageError(
            f"{path}: the store fails at the moment or is out of reach ({kind})",
            code="E_STORAGE_BUSY",
            hint="check the network and the store's endpoint, then run it again",
        )
    answer = f"{kind}, {status}" if status else kind
    return StorageError(
        f"{path}: the store's answer could not be used ({answer})",
        hint="check bucket, region and endpoint",
    )


def _status(error: Exception) -> int:
    """Return the HTTP status, wherever the client keeps it."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        for name in ("status_code", "status", "code"):
            if isinstance(value := getattr(one, name, None), int):
                return value
    return 0


def _is_network(error: Exception) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or getattr(error, "errno", None) in _BUSY
        or type(error).__module__.partition(".")[0] in _NETWORK
        or bool(names & {"HTTPClientError", "ConnectionError", "ResponseParserError"})
    )
