"""One file from the Hub into huggingface_hub's cache, and proof that it is the Hub's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from d3pack.errors import D3MError, HubError, HubOfflineError, NotFoundError
from d3pack.hub.address import Address
from d3pack.hub.failures import hub_calls

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def fetch(address: Address) -> tuple[Path, Address]:
    """The file in the cache, downloaded if need be, and its address with file and commit filled in.

    huggingface_hub checks the size of a download and names it by its ETag; here the bytes must also
    hash to it, so that a flipped bit, a proxy's page, or a branch that moves between HEAD and GET
    never stays in the cache.
    """
    wanted, address = address, with_file(address)
    blobs, snapshots = _cached_blobs(address), _cached_snapshots(address)
    path = _download(address)
    pinned = address.at(commit_of(path))
    blob = _blob(path)
    downloaded = blob is not None and blob.name not in blobs
    if _whole(path) and (
        downloaded or pinned.revision in snapshots or _is_of_the_commit(path, pinned)
    ):
        _remember(wanted, pinned)
        return path, pinned
    damaged = not _whole(path)
    _discard(path, damaged=damaged)
    path = _download(pinned, force=damaged)
    if _whole(path) and _is_of_the_commit(path, pinned):
        _remember(wanted, pinned)
        return path, pinned
    _discard(path, damaged=not _whole(path))
    raise HubError(
        f"{pinned}: the bytes that arrive are not the ones the Hub announces",
        code="E_HUB_BYTES",
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
    """What the file in the snapshot links to: `blobs/<ETag>`, which may be a link in turn."""
    # A cache without symlinks (Windows) has the file itself, and keeps no ETag.
    return path.parent / os.readlink(path) if path.is_symlink() else None


def _whole(path: Path) -> bool:
    """Whether the bytes hash to the ETag that names them, as far as the cache keeps it."""
    name = "" if (blob := _blob(path)) is None else blob.name
    return _DIGEST.fullmatch(name) is None or digest(path, len(name)) == name


def _is_of_the_commit(path: Path, address: Address) -> bool:
    """Whether the bytes are what the commit's tree says: the ETag of one answer may be stale."""
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


def _discard(path: Path, *, damaged: bool) -> None:
    """Take a file out of the snapshot; a blob that is whole may serve another commit."""
    blob = _blob(path)
    path.unlink(missing_ok=True)
    if damaged and blob is not None:
        blob.unlink(missing_ok=True)


def _remember(wanted: Address, found: Address) -> None:
    """Note which commit a branch was, as huggingface_hub does: offline, `org/name` asks for it."""
    if wanted.pinned or _cached_commit(wanted) == found.revision:
        return
    ref = _storage(wanted) / "refs" / (wanted.revision or "main")
    with contextlib.suppress(OSError):  # a read-only cache only costs the short form offline
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(str(found.revision), encoding="ascii")


def _storage(address: Address) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=address.repo, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE) / folder


def _cached_blobs(address: Address) -> set[str]:
    return {blob.name for blob in (_storage(address) / "blobs").glob("*")}


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
