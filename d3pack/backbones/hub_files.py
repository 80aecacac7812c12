"""Backbone files from the Hugging Face Hub, by revision; each way to fail has its own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from d3pack.errors import BackboneError, BackboneGatedError, BackboneGoneError, BackboneOfflineError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Description:
    """What the Hub says about a repository at one revision."""

    revision: str
    licence: str
    paths: tuple[str, ...]


def describe(repo: str, revision: str | None) -> Description:
    """Resolve a branch or tag to a commit, and list its files."""
    from huggingface_hub import HfApi

    info = _ask(repo, revision, lambda: HfApi().model_info(repo, revision=revision))
    licence = info.card_data.get("license") if info.card_data else None
    paths = tuple(sorted(s.rfilename for s in info.siblings or ()))
    if not info.sha:
        raise BackboneError(f"the Hub names no commit for {repo}")
    return Description(info.sha, str(licence or "unknown"), paths)


def fetch(repo: str, revision: str, paths: Sequence[str]) -> Path:
    """A local snapshot that has these files; from the cache alone if they are all there."""
    from huggingface_hub import snapshot_download

    return Path(
        _ask(
            repo,
            revision,
            lambda: snapshot_download(repo, revision=revision, allow_patterns=list(paths)),
        )
    )


def _ask(repo: str, revision: str | None, call: Callable[[], T]) -> T:
    import httpx
    from huggingface_hub import errors as hub

    at = f" at {revision[:12]}" if revision else ""
    try:
        return call()
    except hub.GatedRepoError:
        raise BackboneGatedError(
            f"{repo} is gated",
            hint=f"accept its licence at huggingface.co/{repo} and log in with `hf auth login`",
        ) from None
    except hub.RevisionNotFoundError:
        raise BackboneGoneError(
            f"{repo} no longer has the revision{at}",
            hint="point to a mirror of the locked files with --backbone PATH",
        ) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise BackboneGoneError(
            f"{repo} is not on the Hub, or not visible with your token",
            hint="point to a mirror of the locked files with --backbone PATH",
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, httpx.TransportError):
        raise BackboneOfflineError(
            f"{repo}{at} is not on this machine, and the Hub cannot be reached",
            hint="connect once to download it, or point to a copy with --backbone PATH",
        ) from None
    except hub.HfHubHTTPError as error:
        raise BackboneError(
            f"the Hub refused {repo}: {str(error).splitlines()[0]}", hint="try again later"
        ) from None
