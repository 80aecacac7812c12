"""Parts of one file on the Hub, by range requests whose answers are checked."""

from __future__ import annotations

import re
import time
from contextlib import AbstractContextManager, closing
from typing import Any, cast

from d3pack.errors import HubError
from d3pack.hub.address import Address
from d3pack.hub.failures import hub_calls, is_network

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_ATTEMPTS = 3  # of reading a part whose body is cut
_SLOWEST = 10_000  # bytes a second, beside six timeouts for the first byte


class RemoteFile:
    """A pack on the Hub, read by ranges at one commit.

    The first read resolves the revision. Later ones ask for that commit, and must be of the same
    file by size and ETag.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.size = 0
        self.requests = 0
        self.received = 0
        self._etag: str | None = None

    def read(self, begin: int, length: int) -> bytes:
        """Return the bytes from `begin` on, fewer than `length` only at the end of the file."""
        with hub_calls(self.address):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return self._read(begin, length)
                except Exception as error:
                    if attempt == _ATTEMPTS or not is_network(error):
                        raise
        raise AssertionError("the last attempt returns or raises")

    def _read(self, begin: int, length: int) -> bytes:
        from huggingface_hub import constants

        headers = _hub_utils().build_hf_headers(library_name="d3pack")
        headers |= {"Range": f"bytes={begin}-{begin + length - 1}", "Accept-Encoding": "identity"}
        self.requests += 1
        with _stream(_url(self.address), headers, constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            _hub_utils().hf_raise_for_status(response)
            expected = self._check(response, begin, length)
            data = bytearray()
            timeout = 6 * constants.HF_HUB_DOWNLOAD_TIMEOUT + expected / _SLOWEST
            deadline = time.monotonic() + timeout
            chunks = getattr(response, "iter_bytes", None) or response.iter_content
            for chunk in chunks(chunk_size=None):  # as they arrive
                data += chunk
                self.received += len(chunk)
                if len(data) > expected:
                    break
                if time.monotonic() > deadline:
                    raise HubError(
                        f"{self.address}: only {len(data)} of {expected} bytes came in time",
                        code="E_HUB_BUSY",
                        hint="try again later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
                    )
        if len(data) != expected:
            raise self._wrong(
                f"{len(data)} bytes arrived where {expected} were announced",
                hint="run it again; a proxy on the way may change answers",
            )
        return bytes(data)

    def _wrong(self, text: str, *, hint: str) -> HubError:
        return HubError(f"{self.address}: {text}", code="E_HUB_BYTES", hint=hint)

    def _check(self, response: Any, begin: int, length: int) -> int:
        """Return how many bytes follow; raise `HubError` for another part or another file."""
        content = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or content is None:
            raise self._wrong(
                f"asked for a range, answered {response.status_code} with no range",
                hint="a proxy or a mirror ignores range requests: pull the whole pack",
            )
        first, last, size = (int(number) for number in content.groups())
        if (first, last) != (begin, min(begin + length, size) - 1):
            raise self._wrong(
                f"asked for bytes {begin}-{begin + length - 1}, got {first}-{last}",
                hint="run it again; a proxy on the way may change answers",
            )
        commit, etag = _identity(response)
        if self.address.pinned:
            commit = commit or self.address.revision
        if commit is None:
            raise self._wrong("the answer names no commit", hint="check HF_ENDPOINT")
        if self.size == 0:
            self.size, self._etag = size, etag
        if (etag, size) != (self._etag, self.size) or (
            self.address.pinned and commit != self.address.revision
        ):
            raise self._wrong(
                "the file changed between two reads",
                hint="run it again; if that fails, too, the Hub or a proxy is inconsistent",
            )
        self.address = self.address.at(commit)
        return last + 1 - first


def _identity(response: Any) -> tuple[str | None, str | None]:
    """Return commit and ETag, which the Hub sends before it redirects to its storage."""
    commit = etag = None
    for step in (*response.history, response):
        commit = commit or step.headers.get("X-Repo-Commit")
        etag = etag or step.headers.get("X-Linked-Etag")
    return commit, etag or response.headers.get("ETag")


def _url(address: Address) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(
        address.repo, str(address.file), repo_type="dataset", revision=address.revision
    )


def _stream(url: str, headers: dict[str, str], timeout: float) -> AbstractContextManager[Any]:
    # retries only failures before the body: after that `RemoteFile.read` starts again
    options: dict[str, Any] = {
        "headers": headers,
        "timeout": timeout,
        "max_retries": 3,
        "retry_on_exceptions": (),
    }
    streamed = getattr(_hub_utils(), "http_stream_backoff", None)
    if streamed is not None:
        return cast(AbstractContextManager[Any], streamed("GET", url, **options))
    # huggingface_hub before 1.0 uses requests
    return closing(_hub_utils().http_backoff("GET", url, stream=True, **options))


def _hub_utils() -> Any:
    """Return a module that is public, but exported lazily, which the type checker cannot see."""
    import huggingface_hub.utils

    return huggingface_hub.utils
