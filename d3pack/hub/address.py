"""Addresses of packs: `hf://datasets/org/name[@rev]/file.d3m[#sha256=ROOT]` and its short forms."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from d3pack.errors import UsageError

SCHEME = "hf://"
EXAMPLE = "hf://datasets/org/name/file.d3m"

_HOSTS = ("huggingface.co", "hf.co")
_REPO = re.compile(r"\b[\w\-.]+\b/\b[\w\-.]{1,96}\b", re.ASCII)
_BARE = re.compile(rf"{_REPO.pattern}(@[^/#]+)?(#.*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROOT = re.compile(r"[0-9a-f]{64}")
# Revisions that hold a slash of their own; any other is one path segment, "%2F" for a slash.
_SPECIAL_REF = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)(?=/|$)", re.ASCII)
_OTHER_HOMES = ("models", "spaces", "kernels", "buckets", "model", "dataset", "space")
_PAGES = ("blob", "resolve", "raw", "tree", "blame")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a pack lives on the Hub."""

    repo: str  # "org/name", always a dataset repository
    file: str | None = None  # None: the repository holds one pack and that is meant
    revision: str | None = None  # None: the repository's default branch
    root: str | None = None  # the identity the pack must have

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit and can never mean other bytes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def web(self) -> str:
        """The page a person opens."""
        url = f"{endpoint()}/datasets/{self.repo}"
        if self.file:
            return f"{url}/blob/{quote(self.revision or 'main', safe='')}/{quote(self.file)}"
        return f"{url}/tree/{quote(self.revision, safe='')}" if self.revision else url

    def at(self, revision: str, *, file: str | None = None, root: str | None = None) -> Address:
        """The same pack, more precisely."""
        return replace(self, revision=revision, file=file or self.file, root=root or self.root)

    def __str__(self) -> str:
        text = f"{SCHEME}datasets/{self.repo}"
        if self.revision:
            special = _SPECIAL_REF.fullmatch(self.revision)
            text += "@" + (self.revision if special else quote(self.revision, safe=""))
        if self.file:
            text += f"/{quote(self.file)}"
        return f"{text}#sha256={self.root}" if self.root else text


def endpoint() -> str:
    """The Hub in use: `HF_ENDPOINT` as huggingface_hub understood it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_address(value: str | os.PathLike[str]) -> bool:
    """Whether a path-or-address means the Hub. An existing file always wins over `org/name`."""
    if not isinstance(value, str):
        return False
    if value.startswith((SCHEME, "http://", "https://", *(f"{host}/" for host in _HOSTS))):
        return True
    bare = _BARE.fullmatch(value) is not None and not value.endswith(".d3m")
    return bare and not os.path.exists(value)  # which a name that is too long does not disturb


def parse(text: str) -> Address:
    """Read an address; whatever cannot be one is refused with the form that would be right."""
    if any(not ch.isprintable() or ch in "\\ " for ch in text):
        raise UsageError(
            f"the address {text!r} holds a space, a backslash or a control character",
            hint=f"write {EXAMPLE}, with %20 for a space",
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
            f"an address can end in #sha256= and 64 lower-case hex digits, not in #{fragment}",
            hint="copy the root that `d3pack info` prints",
        )
    return value


def _split(rest: str, text: str) -> tuple[str, str | None, str | None]:
    """`org/name[@rev][/file]` into its parts."""
    org, _, tail = rest.partition("/")
    name_end = min((tail.find(ch) for ch in "@/" if ch in tail), default=len(tail))
    repo, tail = f"{org}/{tail[:name_end]}", tail[name_end:]
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(f"{text!r} names no repository", hint=f"write {EXAMPLE}")
    revision = None
    if tail.startswith("@"):
        special = _SPECIAL_REF.match(tail[1:])
        raw = special.group() if special else tail[1:].partition("/")[0]
        tail = tail[1 + len(raw) :]
        revision = unquote(raw)
        if not revision or any(part in ("", ".", "..") for part in revision.split("/")):
            raise UsageError(f"{text!r} names no revision after the @", hint=f"write {EXAMPLE}")
    file = unquote(tail.strip("/")) or None
    if file is not None:
        _check_file(file, text)
    return repo, file, revision


def _check_file(file: str, text: str) -> None:
    if any(part in ("", ".", "..") for part in file.split("/")) or "\\" in file or "\0" in file:
        raise UsageError(f"{text!r} leaves its repository", hint=f"write {EXAMPLE}")
    if not file.endswith(".d3m"):
        raise UsageError(
            f"{file!r} is not a pack: its name does not end in .d3m", hint=f"write {EXAMPLE}"
        )


def _from_web(location: str, text: str) -> str:
    """A pasted web address as `org/name[@rev][/file]`; the query is dropped."""
    parts = urlsplit(location if "://" in location else f"https://{location}")
    ours = urlsplit(endpoint())
    if parts.username or parts.password:
        # Never repeat it: what stands before the @ may be a token.
        raise UsageError(
            "the web address holds a user name or a token", hint="remove it and set HF_TOKEN"
        )
    path = parts.path
    if parts.netloc.lower() == ours.netloc.lower():
        path = path.removeprefix(ours.path.rstrip("/"))
    elif parts.hostname not in _HOSTS:
        raise UsageError(
            f"{(parts.netloc or text)!r} is not the Hub ({ours.netloc})",
            hint="set HF_ENDPOINT for another one, or download the file and pass its path",
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
            f"the page /{tail[0]}/ holds no pack", hint="open the file's own page and copy that"
        )
    return f"{repo}@{'/'.join(tail[1:])}" if tail[1:] else repo


def _not_a_dataset(text: str, home: str, rest: str) -> UsageError:
    inner = rest if home in _OTHER_HOMES else f"{home}/{rest}"
    return UsageError(
        f"{text!r} is not in a dataset repository, where packs live",
        hint=f"did you mean {SCHEME}datasets/{inner}",
    )
