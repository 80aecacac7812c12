"""One file from the Hub in huggingface_hub's cache, proved to be the one that the Hub has."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from d3pack.errors import D3MError, HubError, HubOfflineError, NotFoundError, UsageError
from d3pack.hub.address import Address, check_file
from d3pack.hub.failures import hub_calls
from d3pack.system import replace_file

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def fetch(address: Address) -> tuple[Path, Address]:
    """Return the file in the cache, downloaded if need be, and its address with file and commit.

    huggingface_hub checks the size of a download and names it by its ETag. Here the bytes must also
    hash to the ETag, so that a flipped bit, a page of a proxy, or a branch that moves between HEAD
    and GET never stays in the cache.
    """
    requested, address = address, with_file(address)
    blobs, snapshots = _cached_blobs(address), _cached_snapshots(address)
    path = _download(address)
    pinned = address.at(commit_of(path))
    blob = _blob(path)
    downloaded = blob is not None and blob.name not in blobs
    if _intact(path) and (
        downloaded or pinned.revision in snapshots or _is_of_the_commit(path, pinned)
    ):
        _remember(requested, pinned)
        return path, pinned
    damaged = not _intact(path)
    _discard(path, damaged=damaged)
    path = _download(pinned, force=damaged)
    if _intact(path) and _is_of_the_commit(path, pinned):
        _remember(requested, pinned)
        return path, pinned
    _discard(path, damaged=not _intact(path))
    raise HubError(
        f"{pinned}: the bytes that arrive are not the ones that the Hub announces",
        code="E_HUB_BYTES",
        hint="run it again; if that fails, too, a proxy or a mirror changes them",
    )


def with_file(address: Address) -> Address:
    """Return the address with its file: without one, the only pack of the repository is meant.

    A request to the Hub also resolves the revision; offline, the cache is asked.
    """
    if address.file is not None:
        return address
    from huggingface_hub import HfApi

    try:
        with hub_calls(address):
            info = HfApi().dataset_info(address.repo, revision=address.revision)
        names = [str(entry.rfilename) for entry in info.siblings or ()]
        address = address.at(str(info.sha))
    except HubOfflineError:
        commit = _cached_commit(address)
        if commit is None:
            raise
        snapshot = _storage(address) / "snapshots" / commit
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.d3m")]
        address = address.at(commit)
    packs = sorted(name for name in names if name.endswith(".d3m"))
    for name in packs:
        try:
            check_file(name, str(address))
        except UsageError as error:
            raise HubError(f"{address}: {error.args[0]}", hint="name another file") from None
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
    """Return the file if the address has a commit that is in the cache; makes no request."""
    if not address.pinned or address.file is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(
        address.repo, address.file, revision=address.revision, repo_type="dataset"
    )
    return Path(path) if isinstance(path, str) else None


def commit_of(path: Path) -> str:
    """Return the commit of a file in the cache: `.../snapshots/<commit>/<file>`."""
    parts = path.parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def _download(address: Address, *, force: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_calls(address):
        return Path(
            hf_hub_download(
                address.repo,
                str(address.file),
                repo_type="dataset",
                revision=address.revision,
                library_name="d3pack",
                force_download=force,
            )
        )


def _blob(path: Path) -> Path | None:
    """Return what the file in the snapshot links to: `blobs/<ETag>`, which may be a link itself."""
    # a cache without symlinks (Windows) has the file itself, and no ETag
    return path.parent / os.readlink(path) if path.is_symlink() else None


def _intact(path: Path) -> bool:
    """Return whether the bytes hash to the ETag that names them, if the cache has one."""
    name = "" if (blob := _blob(path)) is None else blob.name
    return _DIGEST.fullmatch(name) is None or digest(path, len(name)) == name


def _is_of_the_commit(path: Path, address: Address) -> bool:
    """Return whether the bytes are those of the commit's tree; an ETag may be out of date."""
    from huggingface_hub import HfApi

    try:
        with hub_calls(address):
            entries = HfApi().get_paths_info(
                address.repo, [str(address.file)], revision=address.revision, repo_type="dataset"
            )
    except D3MError:
        _discard(path, damaged=False)
        raise
    for entry in entries:
        lfs = getattr(entry, "lfs", None)
        expected = str(lfs.sha256 if lfs is not None else getattr(entry, "blob_id", ""))
        return digest(path, len(expected)) == expected
    return False


def digest(path: Path, length: int) -> str:
    """Return the SHA-256 (64 digits) or git blob id (40 digits) of a file, as ETags are."""
    if length == 64:
        hasher = hashlib.sha256()
    else:
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _discard(path: Path, *, damaged: bool) -> None:
    """Remove a file from the snapshot; a blob that is not damaged may belong to another commit."""
    blob = _blob(path)
    path.unlink(missing_ok=True)
    if damaged and blob is not None:
        blob.unlink(missing_ok=True)


def _remember(requested: Address, pinned: Address) -> None:
    """Note the commit of a branch as huggingface_hub does: offline, `org/name` needs it."""
    if requested.pinned or _cached_commit(requested) == pinned.revision:
        return
    ref = _storage(requested) / "refs" / (requested.revision or "main")
    with contextlib.suppress(OSError, D3MError):  # a read-only cache has no short form offline
        ref.parent.mkdir(parents=True, exist_ok=True)
        replace_file(ref, str(pinned.revision).encode("ascii"))


def _storage(address: Address) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=address.repo, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE) / folder


def _cached_blobs(address: Address) -> set[str]:
    return {blob.name for blob in (_storage(address) / "blobs").glob("*")}


def _cached_snapshots(address: Address) -> set[str]:
    """Return the commits whose file is in the cache."""
    snapshots = _storage(address) / "snapshots"
    return {commit.name for commit in snapshots.glob("*") if (commit / str(address.file)).exists()}


def _cached_commit(address: Address) -> str | None:
    """Return the commit of the revision when it was last downloaded."""
    if address.pinned:
        snapshot = _storage(address) / "snapshots" / str(address.revision)
        return address.revision if snapshot.is_dir() else None
    ref = _storage(address) / "refs" / (address.revision or "main")
    return ref.read_text(encoding="ascii").strip() if ref.is_file() else None
