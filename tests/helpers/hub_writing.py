"""The calls of the loopback Hub that change it: create, branch, preupload, LFS, commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import yaml
from hub_store import Blob, Repo

if TYPE_CHECKING:
    from hub_loopback import LoopbackHub

DEFAULT_ATTRIBUTES = (
    b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.parquet filter=lfs diff=lfs merge=lfs -text\n"
)


class WriteCalls:
    """Mixed into the handler, which answers with `reply` and `error`."""

    hub: LoopbackHub

    @property
    def account(self) -> str:
        """Whose token the request has; "" for nobody."""
        raise NotImplementedError

    body: bytes
    query: dict[str, list[str]]
    reply: Any
    error: Any
    files_at: Any

    def may_write(self) -> bool:
        if not self.account:
            self.reply(401, {"error": "Invalid username or password."})
        return bool(self.account)

    def create_repo(self, wish: dict[str, Any]) -> None:
        if not self.may_write():
            return
        organisation = wish.get("organization") or self.account
        kind, name = wish.get("type", "model") + "s", f"{organisation}/{wish['name']}"
        if organisation != self.account:
            self.reply(403, {"error": f"You don't have the rights to create under {organisation}"})
            return
        url = f"{self.hub.url}/{kind}/{name}"
        if f"{kind}/{name}" in self.hub.repos:
            self.reply(409, {"error": "You already created this repo", "url": url})
            return
        private = wish.get("visibility") == "private" or wish.get("private") is True
        repo = self.hub.repo(name, kind, private=private)
        repo.commit({".gitattributes": Blob(DEFAULT_ATTRIBUTES)}, title="initial commit")
        self.reply(200, {"url": url, "name": name, "id": name})

    def branch(self, repo: Repo, branch: str) -> None:
        if not self.may_write():
            return
        if branch in repo.refs:
            self.error(409, "", f"Reference already exists: {branch}")
            return
        repo.refs[branch] = repo.refs["main"]
        self.reply(200, {})

    def validate_yaml(self, content: str) -> None:
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            value = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as error:
            self.reply(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        missing = [] if isinstance(value, dict) else [{"message": "empty or missing yaml metadata"}]
        self.reply(200, {"errors": [], "warnings": missing})

    def preupload(self, repo: Repo, revision: str) -> None:
        if not self.may_write():
            return
        found = self.files_at(repo, revision)
        if found is None:
            return
        attributes = found[1].get(".gitattributes", Blob(b"")).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        answer = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            large = file["size"] > 10_000_000 or any(fnmatch(file["path"], p) for p in patterns)
            old = found[1].get(file["path"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if binary or large else "regular",
                    "shouldIgnore": False,
                    "oid": old.etag if old else None,
                }
            )
        self.reply(200, {"files": answer})

    def batch(self, key: str) -> None:
        if not self.may_write():
            return
        if key not in self.hub.repos:
            self.error(404, "RepoNotFound", "Repository not found")
            return
        objects = []
        for wish in json.loads(self.body)["objects"]:
            value: dict[str, Any] = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.hub.lfs:
                value["actions"] = {"upload": {"href": f"{self.hub.cdn}/lfs/{wish['oid']}"}}
            objects.append(value)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "the object is not what its name says"})
            return
        self.hub.lfs[oid] = self.body
        self.reply(200, {})

    def commit(self, repo: Repo, revision: str) -> None:
        if not self.may_write():
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        head = repo.resolve(revision)
        if head is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if header.get("parentCommit") not in (None, head):
            self.error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        changes: dict[str, Blob | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                changes[value["path"]] = Blob(self.hub.lfs[value["oid"]], lfs=True)
            else:
                changes[value["path"]] = None
        page = f"{self.hub.url}/{repo.kind}/{repo.name}"
        answer: dict[str, Any] = {}
        ref = revision
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
            repo.refs[ref] = head
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        sha = repo.commit(changes, ref, header["summary"])
        answer |= {"commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        self.reply(200, answer)
