"""From an address to a pack: whole, its header, or a few classes."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_loopback import LoopbackHub
from hub_packs import make_pack
from huggingface_hub import constants, file_download

from d3pack import hub as d3hub
from d3pack.errors import HubError, InvalidPackError, NoSpaceError, NotFoundError, UsageError
from d3pack.format import EMBEDDED, Coded, FileLock, Pack, pack_bytes, read_header
from d3pack.hub import PushSettings, parse_address
from d3pack.hub.download import download
from d3pack.testing import raises_code

ADDRESS = "hf://datasets/org/set/a.d3m"
PACK = make_pack()
DATA = pack_bytes(PACK)


def part_of(pack: Pack, rows: Sequence[int]) -> Pack:
    return replace(pack.select(rows), probes=None)


def test_downloaded_pack_has_an_exact_address(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "d3pack")
    commit = hub.put("org/set", {"a.d3m": DATA})
    pulled = download(parse_address(ADDRESS))
    assert pulled.pack == PACK
    assert len(hub.seen) == 2
    exact = f"hf://datasets/org/set@{commit}/a.d3m#sha256={PACK.root}"
    assert str(pulled.address) == exact
    assert caplog.messages == [exact]
    hub.seen.clear()
    assert d3hub.load(exact) == PACK
    assert d3hub.load_named(exact) == ("a.d3m", PACK)
    assert hub.seen == []


def test_pull_writes_the_output_and_checks_the_signature(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put("org/set", {"deep/a.d3m": DATA})
    pulled = d3hub.pull("org/set", output=tmp_path)
    assert (pulled.path, pulled.signature) == (tmp_path / "a.d3m", "not signed")
    assert pulled.path.read_bytes() == DATA
    assert d3hub.pull("org/set", output=str(tmp_path / "b.d3m")).path == tmp_path / "b.d3m"
    pulled.path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists and is another file"):
        d3hub.pull("org/set", output=tmp_path)
    assert d3hub.pull("org/set", output=tmp_path, overwrite=True).path.read_bytes() == DATA
    assert d3hub.pull("org/set").path.is_relative_to(constants.HF_HUB_CACHE)
    with raises_code("E_HUB_SIGNATURE", match="holds no signature"):
        d3hub.pull("org/set", trust=d3hub.Trust(required=True))


def test_pack_with_another_root_than_the_pinned_one_is_refused(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": pack_bytes(make_pack(seed=2))})
    pinned = f"{ADDRESS}#sha256={PACK.root}"
    for call in (d3hub.load, d3hub.load_named, d3hub.remote_info):
        with raises_code("E_HUB_PIN", match="is a valid pack, but its root is"):
            call(pinned)
    with raises_code("E_HUB_PIN"):
        d3hub.read_classes(pinned, [0])


def test_remote_file_that_is_not_a_pack_is_refused(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA[:-1] + bytes([DATA[-1] ^ 1])})
    with raises_code("E_LEAF"):
        d3hub.load(ADDRESS)
    hub.put("org/set", {"a.d3m": b"<html>not found</html>"}, lfs=())
    with pytest.raises(InvalidPackError):
        d3hub.load(ADDRESS)
    for call in (d3hub.remote_info, lambda text: d3hub.read_classes(text, [0])):
        with pytest.raises(InvalidPackError):
            call(ADDRESS)


def test_pack_longer_than_its_header_says_is_not_read_whole(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    data = DATA.ljust(32 << 20, b"\0")
    hub.put("org/set", {"a.d3m": data})
    long = tmp_path / "long.d3m"
    long.write_bytes(data)
    calls: tuple[Callable[[], object], ...] = (
        lambda: d3hub.load(ADDRESS),
        lambda: d3hub.prepare_push(long, "org/set", PushSettings(preview="none")),
    )
    for call in calls:
        with raises_code("E_TRAILING"):
            call()
        tracemalloc.start()  # what is in the cache now is not downloaded again
        with raises_code("E_TRAILING"):
            call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < len(data) / 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Data processing error: No space left on device (os error 28)"),  # hf_xet
    ],
)
def test_full_disk_is_a_no_space_error(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    hub.put("org/set", {"a.d3m": DATA})
    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(NoSpaceError, match="no space left in the Hub cache; free some"):
            d3hub.load(ADDRESS)
    assert d3hub.load(ADDRESS) == PACK


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_named(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    hub.put("org/set", {"a.d3m": DATA})
    monkeypatch.setattr(file_download, "http_get", refused)
    with pytest.raises(HubError, match="the Hub cache cannot be written; set HF_HOME"):
        d3hub.load(ADDRESS)


def test_local_paths_make_no_request(hub: LoopbackHub, tmp_path: Path) -> None:
    path = tmp_path / "a.d3m"
    path.write_bytes(DATA)
    assert d3hub.load(path) == d3hub.load(str(path)) == PACK
    assert d3hub.load_named(str(path)) == ("a.d3m", PACK)
    assert d3hub.read_classes(path, [1]) == part_of(PACK, [1])
    with pytest.raises(NotFoundError, match="for the Hub write hf://datasets"):
        d3hub.load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError):
        d3hub.load(tmp_path / "none.d3m")
    assert hub.seen == []


def test_remote_info_makes_one_request_of_64_kib(hub: LoopbackHub) -> None:
    whole = make_pack(1000, 2)
    data = pack_bytes(whole)
    commit = hub.put("org/set", {"a.d3m": data})
    info = d3hub.remote_info(ADDRESS)
    assert isinstance(info.address, d3hub.Address)
    assert info.header.manifest == whole.manifest
    assert info.outline.classes == whole.classes
    assert info.outline.ledger() == whole.ledger()
    assert (info.header.size, info.received, info.requests) == (len(data), 65_536, 1)
    assert (info.address.revision, info.address.root) == (commit, whole.root)
    assert sum(seen.sent for seen in hub.seen) == 65_536


@pytest.mark.parametrize("rows", [[7], [999, 3], [0, 1, 2, 500]])
def test_read_classes_reads_less_than_a_tenth_of_a_large_pack(
    hub: LoopbackHub, rows: list[int]
) -> None:
    whole = make_pack(1000, 2)
    data = pack_bytes(whole)
    hub.put("org/set", {"a.d3m": data})
    part = d3hub.read_classes(ADDRESS, rows)
    assert part == part_of(whole, rows)
    assert sum(seen.sent for seen in hub.seen) < len(data) / 10
    bodies = sum(seen.sent > 0 for seen in hub.seen)
    assert bodies <= 1 + len(rows), "the beginning, and one range for each class"
    assert d3hub.read_classes(ADDRESS, [whole.classes[row] for row in rows]) == part


def test_read_classes_keeps_the_embedded_backbone(hub: LoopbackHub) -> None:
    section = Coded(
        "files",
        {"shared": np.frombuffer(b"{}", np.uint8)},
        {"files": [["transformer/config.json", "bytes", 2]], "parts": [2, 0, 0]},
        frozenset({"shared"}),
    )
    large = make_pack(1000, 2)
    lock = FileLock(2, hashlib.sha256(b"{}").hexdigest())
    backbone = replace(large.recipe.backbone, files={"transformer/config.json": lock})
    recipe = replace(large.recipe, backbone=backbone)
    whole = replace(large, recipe=recipe, optional={EMBEDDED: {}}, extensions={EMBEDDED: section})
    data = pack_bytes(whole)
    hub.put("org/set", {"a.d3m": data})
    info = d3hub.remote_info(ADDRESS)
    assert info.outline.ledger() == whole.ledger()
    assert info.outline.ledger().backbone == 0
    part = d3hub.read_classes(ADDRESS, [7, 3])
    assert part == part_of(whole, [7, 3])
    assert EMBEDDED in part.extensions
    assert sum(seen.sent for seen in hub.seen) < len(data) / 5


def test_read_classes_downloads_the_pack_if_most_is_needed(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    assert d3hub.read_classes(ADDRESS, range(9)) == part_of(PACK, range(9))
    assert d3hub.read_classes(ADDRESS, range(10)) == PACK
    exact = download(parse_address(ADDRESS)).address
    hub.seen.clear()
    assert d3hub.read_classes(str(exact), [3]) == part_of(PACK, [3])
    assert hub.seen == []


def test_read_classes_of_a_pack_without_optional_sections(hub: LoopbackHub) -> None:
    whole = make_pack(300, full=False)
    hub.put("org/set", {"a.d3m": pack_bytes(whole)})
    assert d3hub.read_classes(ADDRESS, [5, 2]) == whole.select([5, 2])
    with pytest.raises(UsageError, match="no class 'class 9999'"):
        d3hub.read_classes(ADDRESS, ["class 9999"])
    with pytest.raises(UsageError, match="no class -1"):
        d3hub.read_classes(ADDRESS, [-1])
    with pytest.raises(UsageError, match="none of them twice"):
        d3hub.read_classes(ADDRESS, [1, 1])
    with pytest.raises(UsageError):
        d3hub.read_classes(ADDRESS, [])


def test_read_classes_names_a_damaged_class_and_reads_others(hub: LoopbackHub) -> None:
    whole = make_pack(1000, 2)
    data = bytearray(pack_bytes(whole))
    header = read_header(bytes(data))
    data[header.rows + 700 * header.placement.row + 5] ^= 1
    hub.put("org/set", {"a.d3m": bytes(data)})
    assert d3hub.read_classes(ADDRESS, [7]) == part_of(whole, [7])
    with raises_code("E_LEAF", match=r"class 700 \('class 0700'\) does not match its leaf"):
        d3hub.read_classes(ADDRESS, [7, 700])
    with raises_code("E_LEAF", match="class 700 "):
        d3hub.load(ADDRESS)


@pytest.mark.parametrize("offset", [*range(0, 60_000, 1_777), -1])
def test_read_classes_refuses_any_changed_bit(hub: LoopbackHub, offset: int) -> None:
    whole = make_pack(1000, 2, full=False)
    data = bytearray(pack_bytes(whole))
    header = read_header(bytes(data))
    if offset < 0:
        offset += header.rows + 501 * header.placement.row  # the end of the row itself
    data[offset] ^= 4
    hub.put("org/set", {"a.d3m": bytes(data)})
    row = header.rows + 500 * header.placement.row
    if offset < header.rows or row <= offset < row + header.placement.row:
        with pytest.raises(InvalidPackError):
            d3hub.read_classes(ADDRESS, [500])
    else:
        assert d3hub.read_classes(ADDRESS, [500]) == whole.select([500])


def test_remote_info_refuses_a_file_that_is_too_short_or_too_long(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA[:-1]})
    with raises_code("E_TRUNCATED"):
        d3hub.remote_info(ADDRESS)
    hub.put("org/set", {"a.d3m": DATA + b"x"})
    with raises_code("E_TRAILING"):
        d3hub.remote_info(ADDRESS)


def test_remote_info_reads_a_header_longer_than_the_first_request(hub: LoopbackHub) -> None:
    whole = replace(make_pack(), provenance={"notes": ["x" * 1000] * 100})
    data = pack_bytes(whole)
    hub.put("org/set", {"a.d3m": data})
    info = d3hub.remote_info(ADDRESS)
    assert (info.header.manifest, info.outline.classes) == (whole.manifest, whole.classes)
    assert info.received < len(data)


def right_or_error(call: Callable[[], bool]) -> bool | str:
    try:
        return call()
    except (HubError, InvalidPackError) as error:
        return str(error)


FAULTS = ("cut", "stall", "drip", "short", "ignore_range", "wrong_range", "lying_range",
          "other_bytes", "status 429", "status 500")  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("redirect", [True, False])
@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("what", FAULTS)
def test_every_fault_gives_the_right_pack_or_one_line_of_error(
    hub: LoopbackHub,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    times: int,
    redirect: bool,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.redirect_lfs = redirect
    whole = make_pack(300, 2)
    hub.put("org/set", {"a.d3m": pack_bytes(whole)})
    calls: dict[str, Callable[[], bool]] = {
        "load": lambda: d3hub.load(ADDRESS) == whole,
        "part": lambda: d3hub.read_classes(ADDRESS, [7]) == part_of(whole, [7]),
        "info": lambda: d3hub.remote_info(ADDRESS).header.root == whole.root,
    }
    for name, call in calls.items():
        kind, _, status = what.partition(" ")
        hub.faults.clear()
        hub.fault(kind, "cdn|resolve", times=times, after=9_000, seconds=0.4 * (kind == "stall"),
                  status=int(status or 0))  # fmt: skip
        outcome = right_or_error(call)
        assert outcome is True or str(outcome).isprintable()
        hub.faults.clear()
        assert call(), name  # and nothing that went wrong is remembered
    assert not list(cache.rglob("*.incomplete"))


def test_cached_pack_is_read_offline_without_a_socket(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    d3hub.load(ADDRESS)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert d3hub.load(ADDRESS) == d3hub.load("org/set") == PACK
    assert d3hub.read_classes(ADDRESS, [2]) == part_of(PACK, [2])
    with pytest.raises(HubError, match=r"does not hold hf://datasets/org/set/b\.d3m"):
        d3hub.load("hf://datasets/org/set/b.d3m")
    with pytest.raises(HubError, match="offline"):
        d3hub.remote_info("hf://datasets/org/set/b.d3m")


def test_login_page_of_a_network_is_refused(hub: LoopbackHub, cache: Path) -> None:
    for method in ("HEAD", "GET", "POST"):
        hub.fault("portal", "", method=method, times=99)
    for call in (
        lambda: d3hub.load(ADDRESS),
        lambda: d3hub.load("org/set"),
        lambda: d3hub.remote_info(ADDRESS),
        lambda: d3hub.read_classes(ADDRESS, [0]),
    ):
        with pytest.raises(HubError) as caught:
            call()
        assert str(caught.value).isprintable()
    assert not list(cache.glob("*/blobs/*"))


def test_sections_of_a_newer_minor_count_in_the_leaves(hub: LoopbackHub) -> None:
    rows = np.arange(600, dtype=np.uint8).reshape(300, 2)
    tensors: dict[str, np.ndarray] = {"rows": rows, "shared": np.arange(5, dtype=np.uint8)}
    unknown = Coded("odd", tensors, shared=frozenset({"shared"}))
    base = make_pack(300, full=False)
    whole = replace(base, optional={"mood": {}}, extensions={"mood": unknown}, minor=7)
    hub.put("org/set", {"a.d3m": pack_bytes(whole)})
    assert d3hub.read_classes(ADDRESS, [5, 2]) == whole.select([5, 2])
    assert d3hub.remote_info(ADDRESS).header.root == whole.root
