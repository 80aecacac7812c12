"""Downloads into the cache: few requests, and never bytes that are not the Hub's."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
from hub_loopback import LoopbackHub
from huggingface_hub import constants

from d3pack.errors import D3MError, HubOfflineError, NotFoundError
from d3pack.hub.address import parse
from d3pack.hub.cache import digest, fetch
from d3pack.testing import raises_code

OLD = bytes(range(256)) * 80
NEW = OLD[::-1]
ADDRESS = "hf://datasets/org/set/a.d3m"


def assert_clean(cache: Path) -> None:
    """Nothing half-written, and every blob is what its name says."""
    assert not list(cache.rglob("*.incomplete"))
    for blob in cache.glob("*/blobs/*"):
        assert digest(blob, len(blob.name)) == blob.name


@pytest.mark.parametrize("redirect", [True, False])
def test_two_requests_cold_none_when_pinned(hub: LoopbackHub, cache: Path, redirect: bool) -> None:
    hub.redirect_lfs = redirect
    commit = hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse(ADDRESS))
    assert path.read_bytes() == OLD
    assert address.revision == commit
    assert [seen.method for seen in hub.seen] == ["HEAD", "GET"]
    hub.seen.clear()
    assert fetch(address)[0] == path
    assert hub.seen == []
    assert fetch(parse(ADDRESS))[0] == path
    assert [seen.method for seen in hub.seen] == ["HEAD"]
    assert_clean(cache)


def test_the_token_stays_at_the_hub(hub: LoopbackHub, login: None) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.repo("org/set").private = True
    fetch(parse(ADDRESS))
    for seen in hub.seen:
        assert ("Authorization" in {name.title() for name in seen.headers}) == (
            "/cdn/" not in seen.path
        )


def test_a_repository_with_one_pack_needs_no_file_name(hub: LoopbackHub) -> None:
    commit = hub.put("org/set", {"deep/a.d3m": OLD, "README.md": b"x"})
    path, address = fetch(parse("org/set"))
    assert path.read_bytes() == OLD
    assert str(address) == f"hf://datasets/org/set@{commit}/deep/a.d3m"
    assert len(hub.seen) == 3
    hub.put("org/set", {"b.d3m": NEW})
    with pytest.raises(NotFoundError, match=r"holds 2 packs: b\.d3m, deep/a\.d3m"):
        fetch(parse("org/set"))
    hub.put("org/none", {"README.md": b"x"})
    with pytest.raises(NotFoundError, match="holds no pack"):
        fetch(parse("org/none"))


@pytest.mark.parametrize("redirect", [True, False])
@pytest.mark.parametrize("after", [0, 1, 9_000, len(OLD) - 1])
def test_a_cut_body_is_resumed(hub: LoopbackHub, cache: Path, redirect: bool, after: int) -> None:
    hub.redirect_lfs = redirect
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn|resolve", after=after, times=2)
    assert fetch(parse(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "lying_range", "other_bytes"])
def test_a_resume_that_goes_wrong_never_makes_a_wrong_file(
    hub: LoopbackHub, cache: Path, kind: str
) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn", after=5_000)
    hub.fault(kind, "cdn")
    assert fetch(parse(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


def test_a_body_that_is_always_cut_is_an_error(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn", after=0, times=99)
    with raises_code("E_HUB_BUSY", match="failed or was cut"):
        fetch(parse(ADDRESS))
    assert_clean(cache)


def test_a_short_body_with_an_honest_length_is_an_error(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("short", "cdn", times=99)
    with raises_code("E_HUB_BUSY"):
        fetch(parse(ADDRESS))
    assert_clean(cache)


def test_other_bytes_once_are_fetched_again(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn")
    assert fetch(parse(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


def test_other_bytes_always_leave_nothing_behind(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn", times=99)
    with raises_code("E_HUB_BYTES", match="not the ones the Hub announces"):
        fetch(parse(ADDRESS))
    assert not list(cache.glob("*/blobs/*"))
    assert not list(cache.rglob("*.d3m"))


@pytest.mark.parametrize("lfs", [("*.d3m",), ()])
def test_a_branch_that_moves_between_head_and_get(
    hub: LoopbackHub, cache: Path, lfs: tuple[str, ...]
) -> None:
    first = hub.put("org/set", {"a.d3m": OLD}, lfs=lfs)
    hub.fault(
        "then", "resolve", method="HEAD", action=lambda: hub.put("org/set", {"a.d3m": NEW}, lfs=lfs)
    )
    path, address = fetch(parse(ADDRESS))
    assert address.revision == first
    assert path.read_bytes() == OLD
    assert_clean(cache)
    assert fetch(parse(ADDRESS))[0].read_bytes() == NEW


@pytest.mark.parametrize("known", [True, False])
def test_a_stale_etag_never_names_an_old_pack_new(
    hub: LoopbackHub, cache: Path, known: bool
) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    if known:
        _, old = fetch(parse(ADDRESS))
    commit = hub.put("org/set", {"a.d3m": NEW})
    hub.fault("stale_etag", "resolve", method="HEAD")
    path, address = fetch(parse(ADDRESS))
    assert (address.revision, path.read_bytes()) == (commit, NEW)
    if known:  # and the old one is still there
        assert fetch(old)[0].read_bytes() == OLD
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("stale_etag", "resolve", method="HEAD", times=99)
    with raises_code("E_HUB_BYTES"):
        fetch(parse(ADDRESS))
    assert_clean(cache)


def test_a_commit_that_leaves_the_pack_alone_costs_no_download(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    fetch(parse(ADDRESS))
    commit = hub.put("org/set", {"README.md": b"words"})
    hub.seen.clear()
    path, address = fetch(parse(ADDRESS))
    assert (address.revision, path.read_bytes()) == (commit, OLD)
    assert sum(seen.sent for seen in hub.seen) < 1_000


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_waited_for(hub: LoopbackHub, cache: Path, status: int) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault(
        "status", "resolve", method="HEAD", status=status, headers={"Retry-After": "7"}, times=3
    )
    assert fetch(parse(ADDRESS))[0].read_bytes() == OLD
    assert 8.0 in hub.waited  # a second more than asked, against rounding


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_stays_busy_is_an_error(
    hub: LoopbackHub, cache: Path, status: int, method: str
) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("status", "resolve|cdn", method=method, status=status, times=99)
    with raises_code("E_HUB_BUSY", match=str(status)):
        fetch(parse(ADDRESS))
    assert_clean(cache)


def test_a_slow_drip_arrives_and_a_silence_ends(
    hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("drip", "cdn", after=4_000, seconds=0.05)
    assert fetch(parse(ADDRESS))[0].read_bytes() == OLD
    hub.put("org/set", {"a.d3m": NEW})
    hub.fault("stall", "cdn", after=4_000, seconds=5)
    assert fetch(parse(ADDRESS))[0].read_bytes() == NEW
    assert_clean(cache)


def test_what_is_not_there(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    with pytest.raises(NotFoundError, match="no dataset repository org/other"):
        fetch(parse("hf://datasets/org/other/a.d3m"))
    with pytest.raises(NotFoundError, match="no dataset repository org/other"):
        fetch(parse("org/other"))
    with pytest.raises(NotFoundError, match="no revision 'v9'"):
        fetch(parse("hf://datasets/org/set@v9/a.d3m"))
    with pytest.raises(NotFoundError, match=r"no file b\.d3m"):
        fetch(parse("hf://datasets/org/set/b.d3m"))


def test_who_may_not(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.repo("org/set").gated = True
    with raises_code("E_HUB_ACCESS", match="is gated"):
        fetch(parse(ADDRESS))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    with raises_code("E_HUB_ACCESS", match="does not accept the token, or wants") as caught:
        fetch(parse(ADDRESS))
    assert "hf_wrong_token" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    hub.repo("org/set").private = True
    with pytest.raises(NotFoundError, match="or it is private"):
        fetch(parse(ADDRESS))


def test_offline_with_a_full_cache_opens_no_socket(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put("org/set", {"a.d3m": OLD})
    fetch(parse("org/set"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for text in (ADDRESS, "org/set", f"org/set@{commit}", f"hf://datasets/org/set@{commit}/a.d3m"):
        assert fetch(parse(text))[0].read_bytes() == OLD
    for text in ("hf://datasets/org/set/b.d3m", "org/other", "org/set@v2"):
        with pytest.raises(HubOfflineError, match="the cache does not hold hf://datasets/org/"):
            fetch(parse(text))


def test_a_damaged_cache_is_repaired(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse(ADDRESS))
    blob = path.resolve()
    blob.write_bytes(OLD[:-1] + b"?")
    assert fetch(address)[0].read_bytes() == OLD
    assert_clean(cache)


def test_a_blob_in_the_store_that_repositories_share(hub: LoopbackHub, cache: Path) -> None:
    """Files that come by Xet: blobs/<ETag> is itself a link to a file named otherwise."""
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse(ADDRESS))
    blob = path.parent / os.readlink(path)
    assert store.publish_blob_to_shared_store(
        blob_path=blob, xet_hash="ab" * 32, cache_dir=cache, expected_size=len(OLD),
        replace_existing=False,
    )  # fmt: skip
    assert blob.is_symlink()
    hub.seen.clear()
    assert fetch(address)[0].read_bytes() == OLD
    assert hub.seen == []
    target = blob.resolve()
    target.chmod(0o600)
    target.write_bytes(OLD[:-1] + b"?")
    assert fetch(address)[0].read_bytes() == OLD


def test_a_cache_without_symlinks_is_checked_against_the_tree(
    hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn")
    path, _ = fetch(parse(ADDRESS))
    assert not path.is_symlink()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(OLD).hexdigest()


def test_a_dead_endpoint_is_one_line(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for text in (ADDRESS, "org/set"):
        with pytest.raises(D3MError, match=r"connection to http://127\.0\.0\.1:9") as caught:
            fetch(parse(text))
        assert "\n" not in str(caught.value)
