"""Range reads: exactly the requested bytes, of one commit, or an error."""

from __future__ import annotations

import pytest
from hub_loopback import LoopbackHub

from d3pack.errors import HubError, HubOfflineError, NotFoundError
from d3pack.hub import parse_address
from d3pack.hub.remote import RemoteFile
from d3pack.testing import raises_code

DATA = bytes(range(256)) * 400
ADDRESS = "hf://datasets/org/set/a.d3m"


@pytest.mark.parametrize("redirect", [True, False])
def test_ranges_are_exact_and_of_one_commit(hub: LoopbackHub, redirect: bool) -> None:
    hub.redirect_lfs = redirect
    commit = hub.put("org/set", {"a.d3m": DATA})
    file = RemoteFile(parse_address(ADDRESS))
    assert file.read(0, 1_000) == DATA[:1_000]
    assert (file.size, file.address.revision) == (len(DATA), commit)
    hub.put("org/set", {"a.d3m": DATA[::-1]})
    assert file.read(50_000, 7) == DATA[50_000:50_007]
    assert file.read(len(DATA) - 5, 100) == DATA[-5:]
    assert (file.requests, file.received) == (3, 1_012)
    asked = [seen.path for seen in hub.seen if "resolve" in seen.path]
    assert [commit in path for path in asked] == [False, True, True]


def test_short_file_is_read_whole(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": b"tiny"})
    assert RemoteFile(parse_address(ADDRESS)).read(0, 65_536) == b"tiny"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("ignore_range", "answered 200 with no range"),
        ("wrong_range", "asked for bytes 10-109, got 11-110"),
    ],
)
@pytest.mark.parametrize("redirect", [True, False])
def test_answer_with_another_range_is_refused(
    hub: LoopbackHub, kind: str, says: str, redirect: bool
) -> None:
    hub.redirect_lfs = redirect
    hub.put("org/set", {"a.d3m": DATA})
    hub.fault(kind, "cdn" if redirect else "resolve", times=99)
    file = RemoteFile(parse_address(ADDRESS))
    with raises_code("E_HUB_BYTES", match=says):
        file.read(10, 100)
    assert file.received == 0  # the body of a wrong answer is not even read


def test_short_body_is_refused(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    hub.fault("short", "cdn", times=99)
    with raises_code("E_HUB_BYTES", match="50 bytes arrived where 100 were announced"):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)


def test_cut_body_is_requested_again_a_few_times(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    hub.fault("cut", "cdn", after=30, times=2)
    assert RemoteFile(parse_address(ADDRESS)).read(0, 100) == DATA[:100]
    hub.fault("cut", "cdn", after=30, times=99)
    with raises_code("E_HUB_BUSY", match="was cut"):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)


def test_file_that_changes_between_reads_is_refused(hub: LoopbackHub) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    file = RemoteFile(parse_address(ADDRESS))
    file.read(0, 100)
    hub.put("org/set", {"a.d3m": DATA[::-1]})
    repo = hub.repo("org/set")
    repo.commits[str(file.address.revision)] = repo.commits[repo.refs["main"]]
    with raises_code("E_HUB_BYTES", match="changed between two reads"):
        file.read(100, 100)


@pytest.mark.parametrize("status", [429, 500])
def test_busy_hub_is_waited_for(hub: LoopbackHub, status: int) -> None:
    hub.put("org/set", {"a.d3m": DATA})
    hub.fault("status", "resolve", status=status, times=2)
    assert RemoteFile(parse_address(ADDRESS)).read(0, 100) == DATA[:100]
    hub.fault("status", "resolve", status=status, times=99)
    with raises_code("E_HUB_BUSY", match=str(status)):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)


def test_missing_file_is_an_error(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)
    hub.put("org/set", {"a.d3m": b""}, lfs=())
    with pytest.raises(HubError, match="416"):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError):
        RemoteFile(parse_address(ADDRESS)).read(0, 100)


def test_slow_answer_without_end_is_given_up(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.put("org/set", {"a.d3m": DATA})
    hub.fault("drip", "cdn", after=1, seconds=0.03, times=99)
    with raises_code("E_HUB_BUSY", match="of 1000 bytes came in time"):
        RemoteFile(parse_address(ADDRESS)).read(0, 1_000)
