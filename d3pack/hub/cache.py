"""One file from the Hub into huggingface_hub's cache, and proof that it is the Hub's."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from d3pack.errors import D3MError, HubBytesError, HubOfflineError, NotFoundError
from d3pack.hub.address import Address
from d3pack.hub.failures import hub_calls

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def fetch(address: Address) -> tuple[Path, Address]:
    """The file in the cache, downloaded if need be, and its address with file and commit filled in.

    huggingface_hub checks the size of a download and names it by its ETag; here the bytes must also
    hash to it, so that a flipped bit, a proxy's page, or a branch that moves between HEAD and GET
    never stays in the cache.
    """
    address = with_file(address)
    blobs, snapshots = _cached_blobs(address), _cached_snapshots(address)
    path = _download(address)
    pinned = address.at(commit_of(path))
    downloaded = os.path.realpath(path) not in blobs
    new = pinned.revision not in snapshots
    if _is_the_hubs(path, pinned, confirm=new and not (downloaded and path.is_symlink())):
        return path, pinned
    _discard(path)
    path = _download(pinned)
    if _is_the_hubs(path, pinned, confirm=True):
        return path, pinned
    _discard(path)
    raise HubBytesError(
        f"{pinned}: the bytes that arrive are not the ones the Hub announces",
        hint="run it again; if it stays, a proxy or mirror changes them",
    )


def with_file(address: Address) -> Address:
    """The address with its file named: a repository that holds one pack means that one.

    Asking the Hub also resolves the revision; offline, the cache answers.
    """
    if address.file is not None:
        return address
    from huggingface_hub import HfApi

    try:
        with hub_calls(address):
            info = HfApi().dataset_info(address.repo, revision=address.revision)
        names = [entry.rfilename for entry in info.siblings or ()]
        address = address.at(str(info.sha))
    except HubOfflineError:
        commit = _cached_commit(address)
        if commit is None:
            raise
        names = [
            found.relative_to(_storage(address) / "snapshots" / commit).as_posix()
            for found in (_storage(address) / "snapshots" / commit).rglob("*.d3m")
        ]
        address = address.at(commit)
    packs = sorted(name for name in names if name.endswith(".d3m"))
    if not packs:
        raise NotFoundError(f"{address} holds no pack", hint=f"see its files on {address.web}")
    if len(packs) > 1:
        shown = ", ".join(packs[:5]) + (", ..." if len(packs) > 5 else "")
        raise NotFoundError(
            f"{address} holds {len(packs)} packs: {shown}",
            hint=f"name one, such as {replace(address, file=packs[0])}",
        )
    return replace(address, file=packs[0])


def cached(address: Address) -> Path | None:
    """The file if a commit is named and the cache holds it; no request is made."""
    if not address.pinned or address.file is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        address.repo, address.file, revision=address.revision, repo_type="dataset"
    )
    return Path(found) if isinstance(found, str) else None


def commit_of(path: Path) -> str:
    """The commit of a file in the cache: `.../snapshots/<commit>/<file>`."""
    parts = path.parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def _download(address: Address) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_calls(address):
        return Path(
            hf_hub_download(
                address.repo,
                str(address.file),
                repo_type="dataset",
                revision=address.revision,
                library_name="d3pack",
            )
        )


def _is_the_hubs(path: Path, address: Address, *, confirm: bool) -> bool:
    """Whether the bytes hash to their name in the cache, and on `confirm` to the commit's tree."""
    # A cache without symlinks (Windows) keeps no digest: then only the tree can tell.
    name = Path(os.path.realpath(path)).name if path.is_symlink() else ""
    if _DIGEST.fullmatch(name) and digest(path, len(name)) != name:
        return False
    if not confirm:
        return True
    from huggingface_hub import HfApi

    try:
        with hub_calls(address):
            entries = HfApi().get_paths_info(
                address.repo, [str(address.file)], revision=address.revision, repo_type="dataset"
            )
    except D3MError:
        _discard(path)
        raise
    for entry in entries:
        lfs = getattr(entry, "lfs", None)
        promised = lfs.sha256 if lfs is not None else getattr(entry, "blob_id", "")
        return digest(path, len(promised)) == promised
    return False


def digest(path: Path, length: int) -> str:
    """The sha256 (64 digits) or git blob id (40 digits) of a file: what the Hub's ETags are."""
    if length == 64:
        hasher = hashlib.sha256()
    else:
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _discard(path: Path) -> None:
    """Take a file that must not be used out of the cache, with the blob it points to."""
    blob = Path(os.path.realpath(path))
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _storage(address: Address) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=address.repo, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE) / folder


def _cached_blobs(address: Address) -> set[str]:
    return {os.path.realpath(blob) for blob in (_storage(address) / "blobs").glob("*")}


def _cached_snapshots(address: Address) -> set[str]:
    """The commits of which the cache holds the file."""
    snapshots = _storage(address) / "snapshots"
    return {commit.name for commit in snapshots.glob("*") if (commit / str(address.file)).exists()}


def _cached_commit(address: Address) -> str | None:
    """The commit that the cache last saw at the revision."""
    if address.pinned:
        held = _storage(address) / "snapshots" / str(address.revision)
        return address.revision if held.is_dir() else None
    ref = _storage(address) / "refs" / (address.revision or "main")
    return ref.read_text(encoding="ascii").strip() if ref.is_file() else None
