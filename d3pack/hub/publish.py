"""A pack to the Hub in one commit, which is then read back and verified."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d3pack.errors import HubError, HubOfflineError, NotFoundError, UsageError
from d3pack.format import Pack, read, read_file
from d3pack.hub import croissant, viewer
from d3pack.hub.address import Address, check_file, parse_address
from d3pack.hub.card import MARK, Facts, render
from d3pack.hub.failures import LOGIN, hub_calls
from d3pack.hub.record import Record, read_record
from d3pack.hub.remote import RemoteFile
from d3pack.hub.settings import PushSettings
from d3pack.hub.signatures import SUFFIX, sign
from d3pack.system import Counter, flatten

ATTRIBUTES = "*.d3m filter=lfs diff=lfs merge=lfs -text"
_PIECE = 8 << 20  # bytes read back in one request
_MAX_TEXT = 1 << 24  # bytes of README.md and .gitattributes of the repository
# an absolute path with at least one folder, on any system, but not the path of a URL
_LOCAL_PATH = re.compile(
    r"(?:(?<![\w/:.~-])|^)(?:(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|]+[/\\])+|~[/\\])[\w.~-]+"
)
_SHORTEST_SECRET = 4  # a home directory "/" would be found everywhere

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Everything that a push would send, made without a request."""

    address: Address
    pack: Pack
    files: Mapping[str, bytes]  # path in the repository -> bytes; README.md and so on included
    message: str
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Pushed:
    """A commit that was read back."""

    address: Address  # with commit and root: what to give to others
    web: str  # page of the commit, or of the pull request
    sent: tuple[str, ...]  # paths in the commit
    notes: tuple[str, ...]


def push(
    file: str | os.PathLike[str],
    repo: str,
    settings: PushSettings | None = None,
    *,
    progress: Counter | None = None,
) -> Pushed:
    """Publish a pack on the Hub in one commit, with card, preview and metadata; then read it back.

    Needs a token (`hf auth login` or `HF_TOKEN`). Nothing is sent that names a path or a secret of
    this machine. `prepare_push` makes the same files without sending them.

    Args:
        file: the `.d3m` file.
        repo: dataset repository `org/name`, created where it does not exist.
        settings: licence, preview, signature, branch and so on.
        progress: function of (done, total), called for each step of the preview.

    Returns:
        The exact address of the pack, the page of the commit, and the files that it has.

    Raises:
        NotFoundError: there is no such file.
        InvalidPackError: the file is not a valid pack.
        BackboneError: the backbone cannot be used, or makes other images than the probes.
        UsageError: settings that contradict each other, or a pack that tells about this machine.
        HubError: the Hub cannot be reached, refuses, or has other bytes than were sent.

    Example:
        >>> from d3pack import push
        >>> from d3pack.hub import PushSettings
        >>> settings = PushSettings(licence="cc-by-4.0", preview="probes")
        >>> pushed = push("photos.d3m", "org/photos", settings)  # doctest: +SKIP
        >>> str(pushed.address)  # doctest: +SKIP
        'hf://datasets/org/photos@1f0c.../photos.d3m#sha256=9b1e...'
    """
    settings = PushSettings() if settings is None else settings
    check_login()
    return send_push(prepare_push(file, repo, settings, progress=progress), settings)


def check_login() -> None:
    """Raise `HubError` where a push could not be sent, before minutes of decoding."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubOfflineError("offline: a push needs the Hub", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError("there is no Hub token", code="E_HUB_ACCESS", hint=LOGIN)


def prepare_push(
    file: str | os.PathLike[str],
    repo: str,
    settings: PushSettings,
    *,
    progress: Counter | None = None,
) -> Parcel:
    """Read the pack and make every file of the commit; see `push`."""
    path = Path(file)
    if not path.exists():
        raise NotFoundError(f"there is no file {path}", hint="give the .d3m to publish")
    pack, data = read_file(path)
    name = settings.name or path.name
    target = parse_address(f"hf://datasets/{repo.removeprefix('hf://datasets/')}")
    if target.file or target.revision or target.root:
        raise UsageError(
            f"invalid repository {repo!r}: expected org/name", hint="a branch is the revision"
        )
    check_file(name, name)
    address = replace(target, file=name)
    notes: list[str] = []
    facts = Facts(
        pack,
        address,
        licence=settings.licence,
        source=settings.source,
        record=_evaluation(path, pack, settings.evaluation, notes),
        signed=settings.signed,
    )
    shown, preview, picture = _preview(path, pack, settings, notes, progress)
    files = {str(address.file): data}
    place = f"preview/{name.removesuffix('.d3m')}"
    if picture is not None:
        facts = replace(facts, picture=f"{place}.webp", shown=shown)
        files[f"{place}.webp"] = picture
    if preview is not None:
        facts = replace(facts, preview=f"{place}.parquet")
        files[f"{place}.parquet"] = preview
    if settings.signed:
        files[name + SUFFIX] = sign(data, name, settings.key)
    files["croissant.json"] = croissant.render(facts, data, preview)
    files["README.md"] = render(facts).encode()
    files[".gitattributes"] = f"{ATTRIBUTES}\n".encode()
    check_private(pack, files)
    return Parcel(address, pack, files, f"{name}: {pack.root[:16]}", tuple(notes))


def send_push(parcel: Parcel, settings: PushSettings) -> Pushed:
    """Commit a parcel, then read it back by commit and compare every byte; see `push`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    check_login()
    revision = settings.revision
    address = replace(parcel.address, revision=revision)
    repo, api, notes = address.repo, HfApi(library_name="d3pack"), list(parcel.notes)
    with hub_calls(address):
        if not settings.pr:
            private = settings.private or None  # None: as the organisation has it
            api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if settings.private and not api.dataset_info(repo).private:
            raise HubError(
                f"{repo} is public, nothing was sent", hint="make it private on its settings page"
            )
        if revision and not settings.pr:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
        head = str(api.dataset_info(repo, revision=revision).sha)
        files = _merged(parcel.files, address.at(head), notes, settings.replace_card)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=parcel.message,
            repo_type="dataset",
            revision=revision,
            create_pr=settings.pr,
            parent_commit=head,
        )
    pushed = address.at(str(commit.oid), root=parcel.pack.root)
    _read_back(pushed, files)
    _log.info("%s", pushed)
    return Pushed(pushed, str(commit.pr_url or commit.commit_url), tuple(files), tuple(notes))


def _merged(
    files: Mapping[str, bytes], head: Address, notes: list[str], replace_card: bool
) -> dict[str, bytes]:
    """Return the files of the commit; attributes and a card of the repository's own are kept."""
    merged = dict(files)
    lines = _bytes_at(head, ".gitattributes")
    if any(line.split()[:1] == [b"*.d3m"] for line in lines.splitlines()):
        merged[".gitattributes"] = lines
    elif lines:
        merged[".gitattributes"] = lines.rstrip() + f"\n{ATTRIBUTES}\n".encode()
    own = _bytes_at(head, "README.md")
    if own and MARK.encode() not in own and not replace_card:
        del merged["README.md"]
        notes.append("the repository's own README.md was kept (replace_card replaces it)")
    return merged


def _bytes_at(address: Address, path: str) -> bytes:
    """Return a small file of the repository, in any encoding, or b"" if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(address.repo, path, repo_type="dataset", revision=address.revision)
    except EntryNotFoundError:
        return b""
    with open(file, "rb") as opened:
        data = opened.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise HubError(f"{path} of {address.repo} has more than {_MAX_TEXT:,} bytes")
    return data


def _read_back(address: Address, files: Mapping[str, bytes]) -> None:
    """Compare the commit with what was sent: the pack byte by byte, the rest by digests."""
    from huggingface_hub import HfApi

    remote, sent = RemoteFile(address), files[str(address.file)]
    data = bytearray(remote.read(0, _PIECE))
    while len(data) < remote.size == len(sent):
        data += remote.read(len(data), _PIECE)
    same_pack = data == sent and read(bytes(data)).root == address.root
    with hub_calls(address):
        entries = HfApi().get_paths_info(
            address.repo, list(files), revision=address.revision, repo_type="dataset"
        )
    by_path = {str(entry.path): entry for entry in entries}
    wrong = [path for path, data in files.items() if not _same(by_path.get(path), data)]
    if wrong or not same_pack:
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
    return bool(getattr(entry, "blob_id", None) == oid)


def _preview(
    path: Path, pack: Pack, settings: PushSettings, notes: list[str], progress: Counter | None
) -> tuple[int, bytes | None, bytes | None]:
    """Return the number of images of the preview, its parquet, and a picture of them."""
    from d3pack.decode import local_backbone

    backbone = settings.backbone or local_backbone(path, pack)
    kind = settings.preview if settings.preview == "none" or _has_pyarrow(notes) else "none"
    if kind != "decode":
        why = viewer.check_probes(pack, path=backbone, device=settings.device)
        notes.extend([f"the probes were not checked: {why}"] * bool(why))
    if kind == "none":
        return 0, None, None
    if kind == "decode":
        images, labels = viewer.decode_preview(
            pack,
            path=backbone,
            device=settings.device,
            most=settings.preview_images,
            progress=progress,
        )
    else:
        images, labels = viewer.probe_preview(pack, settings.preview_images)
    table = viewer.parquet(images, labels, pack.classes)
    return len(images), table, viewer.picture(images, labels)


def _has_pyarrow(notes: list[str]) -> bool:
    """Return whether a preview can be written; if not, note why."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        notes.append("no preview: it needs pyarrow (pip install 'd3pack[encode]')")
        return False
    return True


def _evaluation(path: Path, pack: Pack, file: Path | None, notes: list[str]) -> Record | None:
    """Return what `d3pack eval` has recorded about this very pack, in `file` or beside the pack."""
    folders = (path.parent, Path())
    beside = [folder / f"{path.stem}.eval" / "evaluation.json" for folder in folders]
    for place in [file] if file else beside:
        if place.is_file():
            record = read_record(place)
            if record.root == pack.root:
                notes.append(f"the accuracies on the card are those that {place} says")
                return record
            if file:
                raise UsageError(
                    f"{place} is about the pack {record.root}, not {pack.root}",
                    hint="evaluate this pack",
                )
            notes.append(f"{place.name} beside the pack is about another pack and was left out")
        elif file:
            raise NotFoundError(f"there is no file {file}", hint="run `d3pack eval` first")
    return None


def check_private(pack: Pack, files: Mapping[str, bytes]) -> None:
    """Raise `UsageError` if a pack or a file holds local paths or secrets of this machine."""
    for part in ("provenance", "optional", "recipe"):
        for name, text in flatten(pack.manifest.get(part, {}), part):
            match = _LOCAL_PATH.search(text)
            if match:
                raise UsageError(
                    f"the pack's {name} holds a local path: {match[0]!r}",
                    hint="encode it again without that option, or edit its provenance",
                )
    for path, data in files.items():
        for what, secret in _secrets().items():
            # the card escapes what Markdown would interpret
            if secret.encode() in data or secret.encode() in data.replace(b"\\", b""):
                raise UsageError(
                    f"{path} holds {what} of this machine",
                    hint="remove it (for a pack: encode again) before publishing",
                )


def _secrets() -> dict[str, str]:
    """Return what must not be in any published byte, by its name."""
    from huggingface_hub import get_token

    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        home = Path("/")
    secrets = {
        "the home directory": str(home) if len(home.parts) > 1 else "",
        "the working directory": str(Path.cwd()) if len(Path.cwd().parts) > 2 else "",
        "the Hub token": get_token() or "",
        "a token": os.environ.get("HUGGING_FACE_HUB_TOKEN", ""),
    }
    return {what: text for what, text in secrets.items() if len(text) >= _SHORTEST_SECRET}
