"""A server on this machine for the viewer, a page that verifies a pack and rebuilds its images."""

from __future__ import annotations

from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, urlsplit

from d3pack.backbones import mini_directory
from d3pack.errors import BackboneError, D3MError, NotFoundError

HOST = "127.0.0.1"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def viewer_directory() -> Path:
    """Return where the built viewer is: in the package, or in a checkout where it was built."""
    package = Path(__file__).resolve().parent / "viewer"
    checkout = package.parents[2] / "viewer" / "dist"
    return package if package.is_dir() else checkout


def viewer_networks() -> Path | None:
    """Return where d3pack-mini has what the viewer needs to rebuild images of `mini`."""
    try:
        folder = mini_directory().with_name("viewer")
    except BackboneError:
        return None
    return folder if folder.is_dir() else None


def viewer_server(
    pack: Path, folder: Path, port: int = 0, *, networks: Path | None = None
) -> ThreadingHTTPServer:
    """Return a server of the viewer in `folder` and one pack; nothing else can be fetched from it.

    Args:
        pack: a .d3m file; the page verifies it.
        folder: the built viewer.
        port: where to listen; 0 takes a free port.
        networks: the networks of `mini` and what runs them, where `folder` does not have them.

    Raises:
        NotFoundError: there is no such file, or the viewer is not built.
        D3MError: the port is taken.
    """
    if not pack.is_file():
        raise NotFoundError(f"{pack} is not a file")
    if not (folder / "index.html").is_file():
        raise NotFoundError(
            f"the viewer is not built in {folder}",
            hint="wheels of releases have it; in a checkout, see viewer/README.md",
        )
    files = {
        f"/{path.relative_to(root).as_posix()}": path
        for root in filter(None, (folder, networks))
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    files["/"] = files["/index.html"]
    files[f"/pack/{quote(pack.name)}"] = pack

    class Handler(_Handler):
        served = files

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise D3MError(
            f"port {port} cannot be used: {error.strerror}", hint="port=0 takes a free one"
        ) from None


def viewer_address(server: ThreadingHTTPServer, pack: Path) -> str:
    """Return the address of the page that shows the pack."""
    # quoted twice: as a part of a path, and that as a value
    return f"http://{HOST}:{server.server_port}/?pack={quote(f'pack/{quote(pack.name)}')}"


class _Handler(BaseHTTPRequestHandler):
    served: ClassVar[dict[str, Path]] = {}
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.served.get(urlsplit(self.path).path)
        # another name for this machine is a page elsewhere that wants to read the pack
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in names:
            return self.send_error(403)
        if path is None:
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", _TYPES.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(data)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # the page was closed
                self.wfile.write(data)
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about requests."""
