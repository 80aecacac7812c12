"""Backbone files from the Hugging Face Hub, by revision; each way to fail has its own error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from d3pack.errors import BackboneError, NoSpaceError
from d3pack.system import first_line, is_disk_full

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Description:
    """What the Hub says about a repository at one revision."""

    repo: str  # its name today: the Hub follows a repository that was renamed
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
    if info.id != repo:
        _log.info("%s is now called %s on the Hub", repo, info.id)
    return Description(info.id, info.sha, str(licence or "unknown"), paths)


def fetch(repo: str, revision: str, paths: Sequence[str]) -> Path:
    """A local snapshot that has these files; from the cache alone if they are all there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    held = [try_to_load_from_cache(repo, path, revision=revision) for path in paths]
    if held and all(isinstance(path, str) for path in held):
        return Path(str(held[0])).parents[len(Path(paths[0]).parts) - 1]
    describe(repo, revision)  # says so if it was renamed; the cache goes by the name in the lock
    return Path(
        _ask(
            repo,
            revision,
            lambda: snapshot_download(repo, revision=revision, allow_patterns=list(paths)),
        )
    )


def fetch_again(repo: str, revision: str, path: str) -> None:
    """Replace one file of the cache: its bytes were damaged on the way, or on the disk."""
    from huggingface_hub import hf_hub_download

    _ask(
        repo,
        revision,
        lambda: hf_hub_download(repo, path, revision=revision, force_download=True),
    )


def _ask(repo: str, revision: str | None, call: Callable[[], T]) -> T:
    from huggingface_hub import errors as hub

    at = f" at {revision[:12]}" if revision else ""
    try:
        return call()
    except BackboneError:
        raise
    except hub.GatedRepoError:
        raise BackboneError(
            f"{repo} is gated",
            code="E_BACKBONE_GATED",
            hint=f"accept its licence at huggingface.co/{repo} and log in with `hf auth login`",
        ) from None
    except hub.RevisionNotFoundError:
        raise BackboneError(
            f"{repo} no longer has the revision{at}",
            code="E_BACKBONE_GONE",
            hint="point to a mirror of the locked files with --backbone PATH",
        ) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise BackboneError(
            f"{repo} is not on the Hub, or not visible with your token",
            code="E_BACKBONE_GONE",
            hint="point to a mirror of the locked files with --backbone PATH",
        ) from None
    except hub.EntryNotFoundError as error:
        if isinstance(error, hub.LocalEntryNotFoundError):
            raise _offline(repo, at) from None
        raise BackboneError(
            f"{repo}{at} no longer has a file of the lock",
            code="E_BACKBONE_GONE",
            hint="point to a mirror of the locked files with --backbone PATH",
        ) from None
    except hub.HfHubHTTPError as error:
        raise BackboneError(
            f"the Hub refused {repo}: {first_line(error)}", hint="try again later"
        ) from None
    except Exception as error:
        if is_disk_full(error):
            raise NoSpaceError(
                "no space left in the Hub cache", hint="free some, or set HF_HOME to another disk"
            ) from error
        # What is left comes from the HTTP library, which huggingface_hub has changed twice.
        raise _offline(repo, at) from error


def _offline(repo: str, at: str) -> BackboneError:
    return BackboneError(
        f"{repo}{at} is not on this machine, and the Hub cannot be reached",
        code="E_BACKBONE_OFFLINE",
        hint="connect once to download it, or point to a copy with --backbone PATH",
    )
