"""Exceptions of huggingface_hub and its HTTP library as errors of d3pack, with what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from d3pack.errors import (
    D3MError,
    HubError,
    HubOfflineError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from d3pack.hub.address import Address, endpoint
from d3pack.system import is_disk_full, is_unwritable

# huggingface_hub has changed its HTTP library twice: exceptions are known by their module
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
LOGIN = "log in with `hf auth login` or set HF_TOKEN"

# exceptions of huggingface_hub, special ones first: class, code, message, hint
_ANSWERS = {
    "GatedRepoError": (
        HubError, "E_HUB_ACCESS", "{repo} is gated", f"ask for access on {{page}}, then {LOGIN}"
    ),
    "RepositoryNotFoundError": (
        NotFoundError, None, "there is no {repo} on {endpoint}, or it is private",
        f"check the name; for a private one {LOGIN}",
    ),
    "RevisionNotFoundError": (
        NotFoundError, None, "{repo} has no revision {revision!r}",
        "see its branches and commits on {page}",
    ),
    "EntryNotFoundError": (
        NotFoundError, None, "{repo} has no file {file} at revision {revision!r}",
        "see its files on {page}/tree/{revision}",
    ),
    "FileMetadataError": (
        HubError, None, "{endpoint} does not answer as a Hub does",
        "check HF_ENDPOINT and the proxy",
    ),
}  # fmt: skip
# status of other answers: code, message, hint
_BUSY = ("E_HUB_BUSY", "the Hub fails at the moment ({status})", "try again later")
_STATUS = {
    401: ("E_HUB_ACCESS", "the Hub does not accept the token, or wants one", LOGIN),
    403: (
        "E_HUB_ACCESS", "the token may not do this with {name}",
        "use a token with write access to it, or another repository",
    ),
    408: _BUSY,
    412: (None, "{name} changed while the commit was made", "run it again"),
    429: ("E_HUB_BUSY", "the Hub limits the rate of requests (429)", "wait and try again"),
}  # fmt: skip


@contextmanager
def hub_calls(address: Address) -> Iterator[None]:
    """Run calls to the Hub; failures are raised as errors of d3pack."""
    try:
        yield
    except D3MError:
        raise
    except Exception as error:
        raise translate(error, address) from error


def translate(error: Exception, address: Address) -> D3MError:
    """Return the error of d3pack for an exception of a call to the Hub."""
    from huggingface_hub import errors as hf

    wrapped = isinstance(error, (hf.LocalEntryNotFoundError, RuntimeError))
    if wrapped and isinstance(error.__cause__, Exception):
        return translate(error.__cause__, address)
    if isinstance(error, (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError)):
        return HubOfflineError(
            f"offline, and the cache does not hold {address}",
            hint=f"once online, run `d3pack pull {address}`, or unset HF_HUB_OFFLINE",
        )
    for name, (kind, code, message, hint) in _ANSWERS.items():
        if isinstance(error, getattr(hf, name)):
            return kind(_filled(message, address), hint=_filled(hint, address), code=code)
    if isinstance(error, hf.HfHubHTTPError):
        return _http(error, address)
    if is_network(error):
        return HubError(
            f"the connection to {endpoint()} failed or was cut ({type(error).__name__})",
            code="E_HUB_BUSY",
            hint="check the network and HF_ENDPOINT, then run it again",
        )
    if is_disk_full(error):
        return NoSpaceError(
            "no space left in the Hub cache", hint="free some, or set HF_HOME to another disk"
        )
    if is_unwritable(error):
        return HubError(
            "the Hub cache cannot be written", hint="set HF_HOME to a directory you may write"
        )
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return UsageError(
            f"the Hub refuses the card's metadata: {' '.join(str(error).split())[:200]}",
            hint="choose another licence: an id such as cc-by-4.0",
        )
    return HubError(
        f"the Hub's answer about {address.repo} could not be used ({type(error).__name__})",
        hint="run it again; if that fails, too, HF_DEBUG=1 shows the requests",
    )


def _http(error: Exception, address: Address) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    unknown = (None, "the Hub refused with status {status}", "look at {page}")
    code, message, hint = _BUSY if status >= 500 else _STATUS.get(status, unknown)
    return HubError(_filled(message, address, status), code=code, hint=_filled(hint, address))


def _filled(text: str, address: Address, status: int = 0) -> str:
    return text.format(
        repo=f"dataset repository {address.repo}",
        name=address.repo,
        file=address.file,
        revision=address.revision or "main",
        page=f"{endpoint()}/datasets/{address.repo}",
        endpoint=endpoint(),
        status=status,
    )


def is_network(error: Exception) -> bool:
    """Return whether the connection failed or was cut; False where an answer was refused."""
    library = type(error).__module__.partition(".")[0]
    if library == "huggingface_hub":
        return False
    short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return library in _HTTP_LIBRARIES or isinstance(error, (ConnectionError, TimeoutError)) or short
