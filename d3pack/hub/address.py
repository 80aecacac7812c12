"""Addresses of packs: `hf://datasets/org/name[@rev]/file.d3m[#sha256=ROOT]` and its short forms.

A pack in an object store is `s3://bucket/file.d3m[#sha256=ROOT]`, or whatever fsspec opens.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from d3pack.errors import UsageError
from d3pack.system import ObjectPath, is_url

SCHEME = "hf://"
EXAMPLE = "hf://datasets/org/name/file.d3m"

_HOSTS = ("huggingface.co", "hf.co")
_REPO = re.compile(r"\b[\w\-.]+\b/\b[\w\-.]{1,96}\b", re.ASCII)
_BARE = re.compile(rf"{_REPO.pattern}(@[^/#]+)?(#.*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROOT = re.compile(r"[0-9a-f]{64}")
# revisions with a slash of their own; any other is one path segment, with "%2F" for a slash
_SPECIAL_REF = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)(?=/|$)", re.ASCII)
_OTHER_HOMES = ("models", "spaces", "kernels", "buckets", "model", "dataset", "space")
_PAGES = ("blob", "resolve", "raw", "tree", "blame")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a pack is on the Hub."""

    repo: str  # "org/name", always a dataset repository
    file: str | None = None  # None: the only pack of the repository
    revision: str | None = None  # None: the default branch of the repository
    root: str | None = None  # the identity that the pack must have

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never stands for other bytes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def web(self) -> str:
        """The web page of the pack."""
        url = f"{endpoint()}/datasets/{self.repo}"
        if self.file:
            return f"{url}/blob/{quote(self.revision or 'main', safe='')}/{quote(self.file)}"
        return f"{url}/tree/{quote(self.revision, safe='')}" if self.revision else url

    def at(self, revision: str, *, file: str | None = None, root: str | None = None) -> Address:
        """Return the address with a revision, and with a file and a root where they are given."""
        return replace(self, revision=revision, file=file or self.file, root=root or self.root)

    def __str__(self) -> str:
        text = f"{SCHEME}datasets/{self.repo}"
        if self.revision:
            special = _SPECIAL_REF.fullmatch(self.revision)
            text += "@" + (self.revision if special else quote(self.revision, safe=""))
        if self.file:
            text += f"/{quote(self.file)}"
        return f"{text}#sha256={self.root}" if self.root else text


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """Where a pack is in an object store."""

    path: ObjectPath
    root: str | None = None  # the identity that the pack must have

    def __str__(self) -> str:
        return f"{self.path}#sha256={self.root}" if self.root else str(self.path)


def parse_object(text: str) -> ObjectAddress:
    """Read the address of an object; a name may hold `#`, but a pin is a pin."""
    url, mark, pin = text.rpartition("#sha256=")
    if not mark:
        return ObjectAddress(ObjectPath(text))
    return ObjectAddress(ObjectPath(url), _pin(f"sha256={pin}"))


def endpoint() -> str:
    """Return the URL of the Hub: `HF_ENDPOINT` as huggingface_hub has read it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_address(value: str | os.PathLike[str]) -> bool:
    """Return whether this is an address on the Hub; an existing file is preferred to `org/name`."""
    if not isinstance(value, str):
        return False
    if value.startswith((SCHEME, "http://", "https://", *(f"{host}/" for host in _HOSTS))):
        return True
    bare = _BARE.fullmatch(value) is not None and not value.endswith(".d3m")
    return bare and not os.path.exists(value)  # os.path allows names that are too long


def parse_address(text: str) -> Address:
    """Read an address in any of its forms.

    Raises:
        UsageError: the text is not an address; the hint has the right form.
    """
    if any(not ch.isprintable() or ch in "\\ " for ch in text):
        raise UsageError(
            f"invalid address {text!r}: it holds a space, a backslash or a control character",
            hint=f"write {EXAMPLE}, with %20 for a space",
        )
    if is_url(text):
        raise UsageError(
            f"{text} is in an object store, not on the Hub",
            hint="it is read there: give it as it is",
        )
    location, _, fragment = text.partition("#")
    root = _pin(fragment) if "#" in text else None
    if location.startswith(SCHEME):
        home, _, rest = location.removeprefix(SCHEME).partition("/")
        if home != "datasets":
            raise _not_a_dataset(text, home, rest)
        repo, file, revision = _split(rest, text)
    elif "://" in location or location.startswith(_HOSTS):
        repo, file, revision = _split(_from_web(location, text), text)
    else:
        repo, file, revision = _split(location, text)
    return Address(repo, file, revision, root)


def _pin(fragment: str) -> str:
    name, _, value = fragment.partition("=")
    if name != "sha256" or not _ROOT.fullmatch(value):
        raise UsageError(
            f"invalid pin {'#' + fragment!r}: expected #sha256= and 64 lower-case hex digits",
            hint="copy the root that `d3pack info` prints",
        )
    return value


def _split(rest: str, text: str) -> tuple[str, str | None, str | None]:
    """Split `org/name[@rev][/file]` into repository, file and revision."""
    org, _, tail = rest.partition("/")
    name_end = min((tail.find(ch) for ch in "@/" if ch in tail), default=len(tail))
    repo, tail = f"{org}/{tail[:name_end]}", tail[name_end:]
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(
            f"invalid address {text!r}: expected a repository org/name", hint=f"write {EXAMPLE}"
        )
    revision = None
    if tail.startswith("@"):
        special = _SPECIAL_REF.match(tail[1:])
        raw = special.group() if special else tail[1:].partition("/")[0]
        tail = tail[1 + len(raw) :]
        revision = unquote(raw)
        if not revision or any(part in ("", ".", "..") for part in revision.split("/")):
            raise UsageError(
                f"invalid address {text!r}: expected a revision after @", hint=f"write {EXAMPLE}"
            )
    file = unquote(tail.strip("/")) or None
    if file is not None:
        check_file(file, text)
    return repo, file, revision


def check_file(file: str, text: str) -> None:
    """Raise `UsageError` unless a file of the repository in `text` can be a pack on any disk."""
    if any(part in ("", ".", "..") for part in file.split("/")) or "\\" in file:
        raise UsageError(f"invalid path {text!r}: it leads out of the repository")
    if not file.isprintable():
        raise UsageError(f"invalid file name {file!r}: it holds control characters")
    if not file.endswith(".d3m"):
        raise UsageError(f"invalid file name {file!r}: expected one that ends in .d3m")


def _from_web(location: str, text: str) -> str:
    """Return a web address as `org/name[@rev][/file]`; the query is dropped."""
    parts = urlsplit(location if "://" in location else f"https://{location}")
    ours = urlsplit(endpoint())
    if parts.username or parts.password:
        # not repeated in the message: it may be a token
        raise UsageError(
            "the web address holds a user name or a token", hint="remove it and set HF_TOKEN"
        )
    path = parts.path
    if parts.netloc.lower() == ours.netloc.lower():
        path = path.removeprefix(ours.path.rstrip("/"))
    elif parts.hostname not in _HOSTS:
        raise UsageError(
            f"{(parts.netloc or text)!r} is not the Hub ({ours.netloc})",
            hint="set HF_ENDPOINT to use another Hub, or download the file and give its path",
        )
    home, _, rest = path.strip("/").partition("/")
    if home != "datasets":
        raise _not_a_dataset(text, home, rest)
    pieces = rest.split("/")
    repo, tail = "/".join(pieces[:2]), pieces[2:]
    if not tail:
        return repo
    if tail[0] not in _PAGES:
        raise UsageError(
            f"the page /{tail[0]}/ has no pack", hint="copy the address of the file's own page"
        )
    return f"{repo}@{'/'.join(tail[1:])}" if tail[1:] else repo


def _not_a_dataset(text: str, home: str, rest: str) -> UsageError:
    inner = rest if home in _OTHER_HOMES else f"{home}/{rest}"
    return UsageError(
        f"{text!r} is not in a dataset repository, where packs are kept",
        hint=f"did you mean {SCHEME}datasets/{inner}",
    )
