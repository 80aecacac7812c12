"""What the loopback Hub keeps: blobs, commits, branches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        body = self.data if not self.lfs else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.data)}\n"
        ).encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """What a listing says of it."""
        value: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": self.git_oid,
        }
        if self.lfs:
            size = {"size": len(self.data), "pointerSize": len(self.pointer)}
            value["lfs"] = {"oid": self.sha256, **size}
        return value


@dataclass
class Repo:
    kind: str  # "datasets" or "models"
    name: str
    private: bool = False
    gated: bool = False
    moved_to: str = ""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: dict[str, Blob | None], ref: str = "main", title: str = "") -> str:
        """A new commit on a branch: each path set, or removed where the value is None."""
        parent = self.refs.get(ref, "")
        files = dict(self.commits.get(parent, {}))
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        seed = parent + title + "".join(f"{p}{b.etag}" for p, b in sorted(files.items()))
        sha = hashlib.sha1(
            f"{self.kind}/{self.name}/{len(self.commits)}/{seed}".encode()
        ).hexdigest()
        self.commits[sha], self.parents[sha], self.titles[sha] = files, parent, title
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def info(self, sha: str) -> dict[str, Any]:
        return {
            "id": self.name,
            "sha": sha,
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [
                {"rfilename": path, "size": len(blob.data)}
                for path, blob in sorted(self.commits[sha].items())
            ],
        }
