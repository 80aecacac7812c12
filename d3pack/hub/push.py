"""A pack to the Hub in one commit, read back and verified."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from d3pack.errors import HubError, HubOfflineError, NotFoundError, UsageError
from d3pack.format import read
from d3pack.format.pack import Pack
from d3pack.hub import card, croissant, preview, sign
from d3pack.hub.address import Address, parse
from d3pack.hub.failures import LOGIN, hub_calls
from d3pack.hub.private import check_private
from d3pack.hub.remote import RemoteFile

Preview = Literal["decode", "probes", "none"]

ATTRIBUTES = "*.d3m filter=lfs diff=lfs merge=lfs -text"
_PIECE = 8 << 20  # bytes read back in one request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What goes along with a pack, and where to."""

    licence: str | None = None
    source: str | None = None
    record: Path | None = None  # evaluation.json of `d3pack eval`
    preview: Preview = "decode"
    images: int | None = None  # in the preview
    backbone: Path | None = None  # a directory that holds it, for the preview
    device: str = "cpu"
    sign: bool = False
    key: Path | None = None
    name: str | None = None  # of the file in the repository


@dataclass(frozen=True, slots=True)
class Parcel:
    """Everything that a push would send; made without a request."""

    address: Address
    pack: Pack
    files: Mapping[str, bytes]  # path in the repository -> bytes; README.md and so on included
    message: str
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Pushed:
    """A commit that was read back."""

    address: Address  # with commit and root: what to hand on
    web: str  # the commit, or the pull request
    sent: tuple[str, ...]  # paths in the commit
    notes: tuple[str, ...]


def check_ready() -> None:
    """Refuse before minutes of decoding what could not be sent afterwards."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubOfflineError("offline: a push needs the Hub", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError("there is no Hub token here", code="E_HUB_ACCESS", hint=LOGIN)


def check_branch(revision: str | None, pr: bool) -> None:
    """Refuse a pull request to a branch: the Hub opens them to main."""
    if pr and revision not in (None, "main"):
        raise UsageError("a pull request goes to main", hint="give --pr or --revision, not both")


def prepare(
    path: Path, repo: str, options: Options, progress: preview.Progress | None = None
) -> Parcel:
    """Read the pack strictly and make every file of the commit."""
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", hint="give the .d3m to publish")
    data = path.read_bytes()
    pack = read(data)
    name = options.name or path.name
    target = parse(f"hf://datasets/{repo.removeprefix('hf://datasets/')}")
    if target.file or target.revision or target.root:
        raise UsageError(
            f"{repo!r} is more than a repository", hint="give org/name; --revision names a branch"
        )
    address = parse(f"{target}/{name}")
    notes: list[str] = []
    stem = name.removesuffix(".d3m")
    facts = card.Facts(
        pack,
        address,
        licence=options.licence,
        source=options.source,
        record=_record(path, pack, options.record, notes),
        signed=options.sign,
    )
    shown, shown_bytes = _preview(path, pack, options, notes, progress)
    files = {str(address.file): data}
    if shown_bytes is not None:
        facts = replace(facts, preview=f"preview/{stem}.parquet", shown=shown)
        files[str(facts.preview)] = shown_bytes
    if options.sign:
        files[name + sign.SUFFIX] = sign.sign(data, name, options.key)
    files["croissant.json"] = croissant.render(facts, data, shown_bytes)
    files["README.md"] = card.render(facts).encode()
    files[".gitattributes"] = f"{ATTRIBUTES}\n".encode()
    check_private(pack, files)
    return Parcel(address, pack, files, f"{name}: {pack.root[:16]}", tuple(notes))


def send(
    parcel: Parcel,
    *,
    private: bool = False,
    revision: str | None = None,
    pr: bool = False,
    replace_card: bool = False,
) -> Pushed:
    """Commit the parcel, then read it back by commit and compare every byte."""
    from huggingface_hub import CommitOperationAdd, HfApi

    check_branch(revision, pr)
    check_ready()
    address = replace(parcel.address, revision=revision)
    repo, api, notes = address.repo, HfApi(library_name="d3pack"), list(parcel.notes)
    with hub_calls(address):
        if not pr:
            api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        if private and not api.dataset_info(repo).private:
            raise HubError(
                f"{repo} is public, nothing was sent", hint="make it private on its settings page"
            )
        if revision and not pr:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
        head = str(api.dataset_info(repo, revision=revision).sha)
        files = _merged(parcel.files, address.at(head), notes, replace_card)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=parcel.message,
            repo_type="dataset",
            revision=revision,
            create_pr=pr,
            parent_commit=head,
        )
    pushed = address.at(str(done.oid), root=parcel.pack.root)
    _read_back(pushed, files)
    _log.info("%s", pushed)
    return Pushed(pushed, str(done.pr_url or done.commit_url), tuple(files), tuple(notes))


def _merged(
    files: Mapping[str, bytes], head: Address, notes: list[str], replace_card: bool
) -> dict[str, bytes]:
    """The files of the commit beside what the repository holds: its own words are kept."""
    out = dict(files)
    lines = _text_at(head, ".gitattributes")
    if any(line.split()[:1] == ["*.d3m"] for line in lines.splitlines()):
        out[".gitattributes"] = lines.encode()
    elif lines:
        out[".gitattributes"] = f"{lines.rstrip()}\n{ATTRIBUTES}\n".encode()
    own = _text_at(head, "README.md")
    if own and card.MARK not in own and not replace_card:
        del out["README.md"]
        notes.append("the repository's own README.md was kept (--replace-card puts the card there)")
    return out


def _text_at(address: Address, path: str) -> str:
    """A small text file of the repository; nothing if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = hf_hub_download(address.repo, path, repo_type="dataset", revision=address.revision)
    except EntryNotFoundError:
        return ""
    return Path(found).read_text(encoding="utf-8")


def _read_back(address: Address, files: Mapping[str, bytes]) -> None:
    """Hold the commit to what was sent: the pack byte by byte, the rest by its digests."""
    from huggingface_hub import HfApi

    wanted = files[str(address.file)]
    remote = RemoteFile(address)
    got = bytearray(remote.read(0, _PIECE))
    while len(got) < remote.size:
        got += remote.read(len(got), _PIECE)
    ours = got == wanted and read(bytes(got)).root == address.root
    with hub_calls(address):
        entries = HfApi().get_paths_info(
            address.repo, list(files), revision=address.revision, repo_type="dataset"
        )
    held = {entry.path: entry for entry in entries}
    wrong = [path for path, data in files.items() if not _same(held.get(path), data)]
    if wrong or not ours:
        what = ", ".join(wrong) or "the pack"
        raise HubError(
            f"commit {address.revision} does not hold what was sent: {what}",
            code="E_HUB_BYTES",
            hint="delete that commit on the Hub and push again",
        )


def _same(entry: Any, data: bytes) -> bool:
    if entry is None:
        return False
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == hashlib.sha256(data).hexdigest())
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return bool(entry.blob_id == oid)


def _preview(
    path: Path,
    pack: Pack,
    options: Options,
    notes: list[str],
    progress: preview.Progress | None,
) -> tuple[int, bytes | None]:
    if options.preview == "none":
        return 0, None
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        notes.append("no preview: it needs pyarrow (pip install 'd3pack[encode]')")
        return 0, None
    if options.preview == "decode":
        from d3pack.decode import local_backbone

        images, labels = preview.decoded(
            pack,
            path=options.backbone or local_backbone(path, pack),
            device=options.device,
            most=options.images,
            progress=progress,
        )
    else:
        images, labels = preview.probes(pack, options.images)
    return len(images), preview.parquet(images, labels, pack.classes)


def _record(
    path: Path, pack: Pack, given: Path | None, notes: list[str]
) -> Mapping[str, Any] | None:
    """What `d3pack eval` found out about this very pack."""
    places = [given] if given else [
        folder / f"{path.stem}.eval" / "evaluation.json" for folder in (path.parent, Path())
    ]  # fmt: skip
    for place in places:
        if place.is_file():
            try:
                record = json.loads(place.read_text(encoding="utf-8"))
                root = record["pack"]["root"]
                card.accuracy_rows(record)
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{place} is no record of `d3pack eval`", hint="give its evaluation.json"
                ) from None
            if root == pack.root:
                return dict(record)
            if given:
                raise UsageError(
                    f"{place} is about the pack {root}, not {pack.root}", hint="evaluate this pack"
                )
            notes.append(f"{place.name} beside the pack is about another pack and was left out")
        elif given:
            raise NotFoundError(f"there is no file {given}", hint="run `d3pack eval` first")
    return None
