"""A small Hub on 127.0.0.1: what huggingface_hub really calls, and faults on demand.

Every request is recorded, so a test can count them; large files are served by a redirect to a
second origin ("localhost" instead of "127.0.0.1"), as the real Hub does with its CDN. State is in
`store`, the calls that change it are in `writing`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Blob, Repo
from hub_writing import WriteCalls


@dataclass
class Fault:
    """One way of going wrong, for the next `times` requests that match."""

    kind: str  # see LoopbackHub.send_file and Handler.answer
    match: str = ""  # regular expression, searched in the path
    method: str = "GET"
    times: int = 1
    status: int = 0
    after: int = 0  # bytes before a cut or a stall
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    action: Any = None  # kind "then": called once the answer is decided, before it is sent


@dataclass
class Seen:
    """A request that arrived, and how it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0  # bytes of body


class LoopbackHub:
    """The server: start it with `with LoopbackHub() as hub`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {"hf_loopback": "org"}
        self.granted: set[str] = set()  # gated repositories whose access was given
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.redirect_lfs = True
        self.waited: list[float] = []  # what the client would have slept
        self.stopping = threading.Event()
        bound = type("Bound", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", 0), bound)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def repo(self, name: str, kind: str = "datasets", **settings: Any) -> Repo:
        """The repository, made if it is not there."""
        return self.repos.setdefault(f"{kind}/{name}", Repo(kind, name, **settings))

    def put(
        self,
        name: str,
        files: dict[str, bytes],
        *,
        kind: str = "datasets",
        ref: str = "main",
        lfs: tuple[str, ...] = ("*.d3m", "*.safetensors"),
    ) -> str:
        """Commit files; those that match `lfs` go to large file storage."""
        blobs: dict[str, Blob | None] = {}
        for path, data in files.items():
            blobs[path] = Blob(data, lfs=any(fnmatch(path, pattern) for pattern in lfs))
            self.lfs[hashlib.sha256(data).hexdigest()] = data
        return self.repo(name, kind).commit(blobs, ref)

    def fault(self, kind: str, match: str = "", **settings: Any) -> Fault:
        fault = Fault(kind, match, **settings)
        self.faults.append(fault)
        return fault

    def count(self, method: str = "", match: str = "") -> int:
        return sum(
            (not method or seen.method == method) and re.search(match, seen.path) is not None
            for seen in self.seen
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is part of the play."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(WriteCalls, BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # -- plumbing ------------------------------------------------------------------------------

    def answer(self) -> None:
        self.parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.read_body()
        self.fault = self.take_fault()
        self.record = Seen(self.command, self.path, dict(self.headers))
        self.hub.seen.append(self.record)
        try:
            if self.fault and self.fault.kind == "status":
                self.reply(self.fault.status, {"error": "fault"}, self.fault.headers)
            elif self.fault and self.fault.kind == "portal":
                page = b"<html>Please log in to this network</html>"
                self.start(200, {"Content-Type": "text/html"}, len(page))
                self.write(page)
            else:
                self.route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def take_fault(self) -> Fault | None:
        for fault in self.hub.faults:
            ours = fault.method == self.command and re.search(fault.match, self.path)
            if fault.times > 0 and ours:
                fault.times -= 1
                return fault
        return None

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.start(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        self.write(body)

    def start(self, status: int, headers: dict[str, str], length: int) -> None:
        self.record.status = status
        if self.fault and self.fault.kind == "then":
            self.fault.action()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def write(self, body: bytes) -> None:
        if self.command != "HEAD":
            self.record.sent += len(body)  # first: the client may look as soon as it has them
            self.wfile.write(body)

    def error(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    # -- who may -------------------------------------------------------------------------------

    @property
    def account(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.tokens.get(token, "") if token else ""

    def open_repo(self, kind: str, name: str) -> Repo | None:
        """The repository if this caller may see it; otherwise the answer is sent."""
        repo = self.hub.repos.get(f"{kind}/{name}")
        if self.headers.get("Authorization") and not self.account:
            self.reply(
                401,
                {"error": "Invalid credentials in Authorization header"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
            return None
        if repo is None or (repo.private and not self.account):
            self.error(404 if self.account else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.moved_to:
            target = self.path.replace(f"/{name}", f"/{repo.moved_to}", 1)
            self.start(307, {"Location": target}, 0)
            return None
        return repo

    # -- routes --------------------------------------------------------------------------------

    def route(self) -> None:
        match self.parts:
            case ["cdn", oid]:
                self.send_file(Blob(self.hub.lfs[oid], lfs=True), {})
            case ["datasets", org, name, "resolve", revision, *path]:
                self.resolve("datasets", f"{org}/{name}", revision, "/".join(path))
            case [org, name, "resolve", revision, *path]:
                self.resolve("models", f"{org}/{name}", revision, "/".join(path))
            case ["api", "repos", "create"]:
                self.create_repo(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self.validate_yaml(json.loads(self.body)["content"])
            case ["api", kind, org, name, *action]:
                repo = self.open_repo(kind, f"{org}/{name}")
                if repo is not None:
                    self.api(repo, action)
            case ["datasets", org, name, "info", "lfs", "objects", "batch"]:
                self.batch(f"datasets/{org}/{name.removesuffix('.git')}")
            case ["lfs", oid]:
                self.upload(oid)
            case _:
                self.error(404, "EntryNotFound", f"no such page: {self.path}")

    def api(self, repo: Repo, action: list[str]) -> None:
        match action:
            case []:
                self.info(repo, "main")
            case ["revision", revision]:
                self.info(repo, revision)
            case ["tree", revision, *under]:
                self.tree(repo, revision, "/".join(under))
            case ["paths-info", revision]:
                self.paths_info(repo, revision)
            case ["preupload", revision]:
                self.preupload(repo, revision)
            case ["branch", branch]:
                self.branch(repo, branch)
            case ["commit", revision]:
                self.commit(repo, revision)
            case _:
                self.error(404, "EntryNotFound", f"no such call: {self.path}")

    def files_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]] | None:
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.open_repo(kind, name)
        if repo is None:
            return
        if repo.gated and name not in self.hub.granted:
            self.error(403 if self.account else 401, "GatedRepo", f"Access to {name} is restricted")
            return
        found = self.files_at(repo, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self.reply(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha},
            )
            return
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.git_oid}"'}
        if self.fault and self.fault.kind == "stale_etag":
            old = repo.commits[repo.parents[sha]][path]
            blob_etag, headers["ETag"] = old.etag, f'"{old.git_oid}"'
        else:
            blob_etag = blob.etag
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob_etag}"', "X-Linked-Size": str(len(blob.data))}
        if blob.lfs and self.hub.redirect_lfs:
            headers["Location"] = f"{self.hub.cdn}/cdn/{blob.sha256}?X-Signature=secret"
            self.start(302, headers, 0)
            return
        self.send_file(blob, headers)

    def send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file's body, whole or a range of it, with whatever goes wrong today."""
        kind = self.fault.kind if self.fault else ""
        data = blob.data
        if kind == "other_bytes":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        begin, end, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and kind != "ignore_range":
            begin, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if begin >= len(data):
                self.start(416, {"Content-Range": f"bytes */{len(data)}"}, 0)
                return
            told = begin
            if kind in ("wrong_range", "lying_range"):
                begin, end = begin + 1, end + 1
                told = begin if kind == "wrong_range" else told
            headers = {
                **headers,
                "Content-Range": f"bytes {told}-{told + end - begin - 1}/{len(data)}",
            }
        body = data[begin:end]
        if kind == "lying_range":
            body += b"\0" * (end - begin - len(body))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"', **headers}
        self.start(status, headers, len(body) if kind != "short" else len(body) // 2)
        if self.command == "HEAD":
            return
        if kind == "short":
            self.write(body[: len(body) // 2])
        elif kind in ("cut", "stall"):
            assert self.fault is not None
            self.write(body[: self.fault.after])
            self.wfile.flush()
            if kind == "stall":
                self.hub.stopping.wait(self.fault.seconds)
            self.close_connection = True
        elif kind == "drip":
            assert self.fault is not None
            for piece in _pieces(body, self.fault.after):
                self.write(piece)
                self.wfile.flush()
                self.hub.stopping.wait(self.fault.seconds)
        else:
            self.write(body)

    def info(self, repo: Repo, revision: str) -> None:
        found = self.files_at(repo, revision)
        if found is None:
            return
        self.reply(200, repo.info(found[0]))

    def tree(self, repo: Repo, revision: str, under: str) -> None:
        found = self.files_at(repo, revision)
        if found is not None:
            files = found[1].items()
            self.reply(200, [b.entry(p) for p, b in sorted(files) if p.startswith(under)])

    def paths_info(self, repo: Repo, revision: str) -> None:
        found = self.files_at(repo, revision)
        if found is not None:
            asked = parse_qs(self.body.decode())["paths"]  # sent as a form
            self.reply(200, [found[1][p].entry(p) for p in asked if p in found[1]])


def _pieces(body: bytes, size: int) -> Iterator[bytes]:
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]
