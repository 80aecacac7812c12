"""The server of the viewer: the page and one pack, to this machine alone."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cli import invoke
from cli_schema import check_output

from d3pack.errors import D3MError, NotFoundError
from d3pack.preview import viewer_address, viewer_directory, viewer_server

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cifar10.d3m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A built viewer, with a link out of it."""
    folder = tmp_path / "dist"
    (folder / "ort").mkdir(parents=True)
    (folder / "index.html").write_text("<p>page</p>", encoding="utf-8")
    (folder / "ort" / "run.wasm").write_bytes(b"\0asm")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a pack whose name must be quoted."""
    pack = tmp_path / "my pack#1.d3m"
    pack.write_bytes(EXAMPLE.read_bytes())
    with viewer_server(pack, folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield viewer_address(server, pack)
        server.shutdown()
        thread.join()


def fetch(page: str, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    """Return what the server answers."""
    connection = HTTPConnection(urlsplit(page).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response, data


def test_page_and_pack_are_served_with_their_types(page: str) -> None:
    (path,) = parse_qs(urlsplit(page).query)["pack"]
    for wanted, kind, data in (
        ("/", "text/html; charset=utf-8", b"<p>page</p>"),
        ("/ort/run.wasm", "application/wasm", b"\0asm"),
        (f"/{path}", "application/octet-stream", EXAMPLE.read_bytes()),
    ):
        response, body = fetch(page, wanted)
        assert (response.status, response.headers["Content-Type"], body) == (200, kind, data)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        head, body = fetch(page, wanted, "HEAD")
        assert (head.status, int(head.headers["Content-Length"]), body) == (200, len(data), b"")


def test_networks_of_another_package_are_served_beside_the_page(
    folder: Path, tmp_path: Path
) -> None:
    networks = tmp_path / "networks"
    (networks / "model").mkdir(parents=True)
    (networks / "model" / "model.json").write_text("{}", encoding="utf-8")
    with viewer_server(EXAMPLE, folder, networks=networks) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        page = viewer_address(server, EXAMPLE)
        response, body = fetch(page, "/model/model.json")
        assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
        assert body == b"{}"
        assert fetch(page, "/model/../secret.txt")[0].status == 404
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", "/../secret.txt", "/link.txt", "/%2e%2e/secret.txt", "/ort", "//etc/passwd"],
)
def test_nothing_else_is_served(page: str, path: str) -> None:
    response, body = fetch(page, path)
    assert response.status == 404
    assert b"secret" not in body


def test_other_names_of_the_machine_and_other_methods_are_refused(page: str) -> None:
    assert fetch(page, "/", Host="evil.example")[0].status == 403
    assert fetch(page, "/", "POST")[0].status == 501
    port = urlsplit(page).port
    assert fetch(page, "/", Host=f"localhost:{port}")[0].status == 200


def test_server_listens_on_this_machine_alone(folder: Path) -> None:
    with viewer_server(EXAMPLE, folder) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_what_is_missing_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"viewer is not built.*viewer/README\.md"):
        viewer_server(EXAMPLE, tmp_path)
    with pytest.raises(NotFoundError, match=r"none\.d3m is not a file"):
        viewer_server(tmp_path / "none.d3m", folder)
    missing = invoke("view", tmp_path / "none.d3m")
    assert missing.exit_code == 5
    assert len(missing.stderr.splitlines()) == 1


def test_taken_port_is_an_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(D3MError, match=f"port {port} cannot be used"):
            viewer_server(EXAMPLE, folder, port)


def test_browser_is_opened_at_the_address_that_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def interrupted(server: ThreadingHTTPServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("d3pack.preview.viewer_directory", lambda: folder)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    done = invoke("view", EXAMPLE, "--format", "json")
    printed = check_output("view", done.stdout)
    assert (done.exit_code, opened) == (0, [printed["address"]])
    assert invoke("view", EXAMPLE, "--no-open", "--format", "quiet").stderr == ""
    assert len(opened) == 1


@pytest.mark.e2e
@pytest.mark.skipif(not (viewer_directory() / "index.html").is_file(), reason="viewer is not built")
def test_command_prints_the_address_until_it_is_interrupted() -> None:
    command = [sys.executable, "-m", "d3pack", "view", str(EXAMPLE), "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?pack=pack/cifar10\.d3m", line)
        assert fetch(line, "/")[0].status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
