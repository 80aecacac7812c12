"""Downloads into the cache: few requests, and never other bytes than the Hub's."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
from hub_loopback import LoopbackHub
from huggingface_hub import constants

from d3pack.errors import D3MError, HubError, HubOfflineError, NotFoundError
from d3pack.hub import parse_address
from d3pack.hub.cache import digest, fetch
from d3pack.testing import raises_code

OLD = bytes(range(256)) * 80
NEW = OLD[::-1]
ADDRESS = "hf://datasets/org/set/a.d3m"


def assert_clean(cache: Path) -> None:
    """No incomplete files, and every blob has the hash of its name."""
    assert not list(cache.rglob("*.incomplete"))
    for blob in cache.glob("*/blobs/*"):
        assert digest(blob, len(blob.name)) == blob.name


@pytest.mark.parametrize("redirect", [True, False])
def test_fetch_makes_two_requests_and_none_for_a_pinned_file(
    hub: LoopbackHub, cache: Path, redirect: bool
) -> None:
    hub.redirect_lfs = redirect
    commit = hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse_address(ADDRESS))
    assert path.read_bytes() == OLD
    assert address.revision == commit
    assert [seen.method for seen in hub.seen] == ["HEAD", "GET"]
    hub.seen.clear()
    assert fetch(address)[0] == path
    assert hub.seen == []
    assert fetch(parse_address(ADDRESS))[0] == path
    assert [seen.method for seen in hub.seen] == ["HEAD"]
    assert_clean(cache)


def test_token_is_sent_to_the_hub_only(hub: LoopbackHub, login: None) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.repo("org/set").private = True
    fetch(parse_address(ADDRESS))
    for seen in hub.seen:
        assert ("Authorization" in {name.title() for name in seen.headers}) == (
            "/cdn/" not in seen.path
        )


def test_address_without_a_file_means_the_only_pack(hub: LoopbackHub) -> None:
    commit = hub.put("org/set", {"deep/a.d3m": OLD, "README.md": b"x"})
    path, address = fetch(parse_address("org/set"))
    assert path.read_bytes() == OLD
    assert str(address) == f"hf://datasets/org/set@{commit}/deep/a.d3m"
    assert len(hub.seen) == 3
    hub.put("org/set", {"b.d3m": NEW})
    with pytest.raises(NotFoundError, match=r"holds 2 packs: b\.d3m, deep/a\.d3m"):
        fetch(parse_address("org/set"))
    hub.put("org/none", {"README.md": b"x"})
    with pytest.raises(NotFoundError, match="holds no pack"):
        fetch(parse_address("org/none"))


@pytest.mark.parametrize("redirect", [True, False])
@pytest.mark.parametrize("after", [0, 1, 9_000, len(OLD) - 1])
def test_cut_body_is_resumed(hub: LoopbackHub, cache: Path, redirect: bool, after: int) -> None:
    hub.redirect_lfs = redirect
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn|resolve", after=after, times=2)
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "lying_range", "other_bytes"])
def test_failed_resume_never_makes_a_wrong_file(hub: LoopbackHub, cache: Path, kind: str) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn", after=5_000)
    hub.fault(kind, "cdn")
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


def test_body_that_is_always_cut_is_an_error(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("cut", "cdn", after=0, times=99)
    with raises_code("E_HUB_BUSY", match="failed or was cut"):
        fetch(parse_address(ADDRESS))
    assert_clean(cache)


def test_short_body_with_its_true_length_is_an_error(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("short", "cdn", times=99)
    with raises_code("E_HUB_BUSY"):
        fetch(parse_address(ADDRESS))
    assert_clean(cache)


def test_wrong_bytes_are_downloaded_again(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn")
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == OLD
    assert_clean(cache)


def test_bytes_that_stay_wrong_leave_no_file(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn", times=99)
    with raises_code("E_HUB_BYTES", match="not the ones that the Hub announces"):
        fetch(parse_address(ADDRESS))
    assert not list(cache.glob("*/blobs/*"))
    assert not list(cache.rglob("*.d3m"))


@pytest.mark.parametrize("lfs", [("*.d3m",), ()])
def test_branch_that_moves_between_head_and_get_gives_the_new_pack(
    hub: LoopbackHub, cache: Path, lfs: tuple[str, ...]
) -> None:
    first = hub.put("org/set", {"a.d3m": OLD}, lfs=lfs)
    hub.fault(
        "then", "resolve", method="HEAD", action=lambda: hub.put("org/set", {"a.d3m": NEW}, lfs=lfs)
    )
    path, address = fetch(parse_address(ADDRESS))
    assert address.revision == first
    assert path.read_bytes() == OLD
    assert_clean(cache)
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == NEW


@pytest.mark.parametrize("known", [True, False])
def test_stale_etag_never_names_an_old_pack_new(hub: LoopbackHub, cache: Path, known: bool) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    if known:
        _, old = fetch(parse_address(ADDRESS))
    commit = hub.put("org/set", {"a.d3m": NEW})
    hub.fault("stale_etag", "resolve", method="HEAD")
    path, address = fetch(parse_address(ADDRESS))
    assert (address.revision, path.read_bytes()) == (commit, NEW)
    if known:  # and the old one is still there
        assert fetch(old)[0].read_bytes() == OLD
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("stale_etag", "resolve", method="HEAD", times=99)
    with raises_code("E_HUB_BYTES"):
        fetch(parse_address(ADDRESS))
    assert_clean(cache)


def test_commit_without_the_pack_costs_no_download(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    fetch(parse_address(ADDRESS))
    commit = hub.put("org/set", {"README.md": b"words"})
    hub.seen.clear()
    path, address = fetch(parse_address(ADDRESS))
    assert (address.revision, path.read_bytes()) == (commit, OLD)
    assert sum(seen.sent for seen in hub.seen) < 1_000


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_hub_is_waited_for(hub: LoopbackHub, cache: Path, status: int) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault(
        "status", "resolve", method="HEAD", status=status, headers={"Retry-After": "7"}, times=3
    )
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == OLD
    assert 8.0 in hub.waited  # a second more than asked, against rounding


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_hub_that_stays_busy_is_an_error(
    hub: LoopbackHub, cache: Path, status: int, method: str
) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("status", "resolve|cdn", method=method, status=status, times=99)
    with raises_code("E_HUB_BUSY", match=str(status)):
        fetch(parse_address(ADDRESS))
    assert_clean(cache)


def test_slow_answer_arrives_and_a_silent_one_is_asked_again(
    hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("drip", "cdn", after=4_000, seconds=0.05)
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == OLD
    hub.put("org/set", {"a.d3m": NEW})
    hub.fault("stall", "cdn", after=4_000, seconds=5)
    assert fetch(parse_address(ADDRESS))[0].read_bytes() == NEW
    assert_clean(cache)


def test_missing_repository_revision_or_file_is_named(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    with pytest.raises(NotFoundError, match="no dataset repository org/other"):
        fetch(parse_address("hf://datasets/org/other/a.d3m"))
    with pytest.raises(NotFoundError, match="no dataset repository org/other"):
        fetch(parse_address("org/other"))
    with pytest.raises(NotFoundError, match="no revision 'v9'"):
        fetch(parse_address("hf://datasets/org/set@v9/a.d3m"))
    with pytest.raises(NotFoundError, match=r"no file b\.d3m"):
        fetch(parse_address("hf://datasets/org/set/b.d3m"))


def test_access_errors_name_the_cause_but_not_the_token(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    hub.repo("org/set").gated = True
    with raises_code("E_HUB_ACCESS", match="is gated"):
        fetch(parse_address(ADDRESS))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    with raises_code("E_HUB_ACCESS", match="does not accept the token, or wants") as caught:
        fetch(parse_address(ADDRESS))
    assert "hf_wrong_token" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    hub.repo("org/set").private = True
    with pytest.raises(NotFoundError, match="or it is private"):
        fetch(parse_address(ADDRESS))


def test_cached_file_is_found_offline_without_a_socket(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put("org/set", {"a.d3m": OLD})
    fetch(parse_address("org/set"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for text in (ADDRESS, "org/set", f"org/set@{commit}", f"hf://datasets/org/set@{commit}/a.d3m"):
        assert fetch(parse_address(text))[0].read_bytes() == OLD
    for text in ("hf://datasets/org/set/b.d3m", "org/other", "org/set@v2"):
        with pytest.raises(HubOfflineError, match="the cache does not hold hf://datasets/org/"):
            fetch(parse_address(text))


def test_damaged_cache_is_repaired(hub: LoopbackHub, cache: Path) -> None:
    hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse_address(ADDRESS))
    blob = path.resolve()
    blob.write_bytes(OLD[:-1] + b"?")
    assert fetch(address)[0].read_bytes() == OLD
    assert_clean(cache)


def test_blob_in_the_shared_store_is_checked(hub: LoopbackHub, cache: Path) -> None:
    """Files that come by Xet: blobs/<ETag> is itself a link to a file named otherwise."""
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    hub.put("org/set", {"a.d3m": OLD})
    path, address = fetch(parse_address(ADDRESS))
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


def test_cache_without_symlinks_is_checked_by_the_tree(
    hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    hub.put("org/set", {"a.d3m": OLD})
    hub.fault("other_bytes", "cdn")
    path, _ = fetch(parse_address(ADDRESS))
    assert not path.is_symlink()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(OLD).hexdigest()


def test_dead_endpoint_is_one_line_of_error(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for text in (ADDRESS, "org/set"):
        with pytest.raises(D3MError, match=r"connection to http://127\.0\.0\.1:9") as caught:
            fetch(parse_address(text))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["\x1b[31ma.d3m", "a\u202em3d.d3m", "a\nb.d3m"])
def test_file_with_control_characters_in_its_name_is_refused(
    hub: LoopbackHub, cache: Path, name: str
) -> None:
    hub.put("org/set", {name: OLD})
    with pytest.raises(HubError, match="it holds control characters") as caught:
        fetch(parse_address("org/set"))
    assert str(caught.value).isprintable()
    assert not list(cache.rglob("*.d3m"))
