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
from d3pack.system import is_disk_full

# huggingface_hub has changed its HTTP library twice: exceptions are known by their module
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


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

    repo = f"dataset repository {address.repo}"
    wrapped = isinstance(error, (hf.LocalEntryNotFoundError, RuntimeError))
    if wrapped and isinstance(error.__cause__, Exception):
        return translate(error.__cause__, address)
    if isinstance(error, (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError)):
        return offline(address)
    if isinstance(error, hf.GatedRepoError):
        return HubError(
            f"{repo} is gated",
            code="E_HUB_ACCESS",
            hint=f"ask for access on {_page(address)}, then {LOGIN}",
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return NotFoundError(
            f"there is no {repo} on {endpoint()}, or it is private",
            hint=f"check the name; for a private one {LOGIN}",
        )
    if isinstance(error, hf.RevisionNotFoundError):
        return NotFoundError(
            f"{repo} has no revision {address.revision or 'main'!r}",
            hint=f"see its branches and commits on {_page(address)}",
        )
    if isinstance(error, hf.EntryNotFoundError):
        return NotFoundError(
            f"{repo} has no file {address.file} at revision {address.revision or 'main'!r}",
            hint=f"see its files on {_page(address)}/tree/{address.revision or 'main'}",
        )
    if isinstance(error, hf.HfHubHTTPError):
        return _http(error, address)
    if is_network(error):
        return HubError(
            f"the connection to {endpoint()} failed or was cut ({_named(error)})",
            code="E_HUB_BUSY",
            hint="check the network and HF_ENDPOINT, then run it again",
        )
    if is_disk_full(error):
        return NoSpaceError(
            "no space left in the Hub cache", hint="free some, or set HF_HOME to another disk"
        )
    if isinstance(error, PermissionError):
        return HubError(
            "the Hub cache cannot be written", hint="set HF_HOME to a directory you may write"
        )
    if isinstance(error, hf.FileMetadataError):
        return HubError(
            f"{endpoint()} does not answer as a Hub does", hint="check HF_ENDPOINT and the proxy"
        )
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return UsageError(
            f"the Hub refuses the card's metadata: {' '.join(str(error).split())[:200]}",
            hint="choose another licence: an id such as cc-by-4.0",
        )
    return HubError(
        f"the Hub's answer about {address.repo} could not be used ({_named(error)})",
        hint="run it again; if that fails, too, HF_DEBUG=1 shows the requests",
    )


def offline(address: Address) -> HubOfflineError:
    """Return the error for a pack that is not in the cache."""
    return HubOfflineError(
        f"offline, and the cache does not hold {address}",
        hint=f"once online, run `d3pack pull {address}`, or unset HF_HUB_OFFLINE",
    )


def _http(error: Exception, address: Address) -> D3MError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status == 401:
        return HubError(
            "the Hub does not accept the token, or wants one", code="E_HUB_ACCESS", hint=LOGIN
        )
    if status == 403:
        return HubError(
            f"the token may not do this with {address.repo}",
            code="E_HUB_ACCESS",
            hint="use a token with write access to it, or another repository",
        )
    if status == 412:
        return HubError(f"{address.repo} changed while the commit was made", hint="run it again")
    if status == 429:
        return HubError(
            "the Hub limits the rate of requests (429)",
            code="E_HUB_BUSY",
            hint="wait and try again",
        )
    if status == 408 or status >= 500:
        return HubError(
            f"the Hub fails at the moment ({status})", code="E_HUB_BUSY", hint="try again later"
        )
    return HubError(f"the Hub refused with status {status}", hint=f"look at {_page(address)}")


def is_network(error: Exception) -> bool:
    """Return whether the connection failed or was cut; False where an answer was refused."""
    library = type(error).__module__.partition(".")[0]
    if library == "huggingface_hub":
        return False
    short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return library in _HTTP_LIBRARIES or isinstance(error, (ConnectionError, TimeoutError)) or short


def _named(error: Exception) -> str:
    return type(error).__name__


def _page(address: Address) -> str:
    return f"{endpoint()}/datasets/{address.repo}"
