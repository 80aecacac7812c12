"""Packs in object stores: read like files, in parts where that is enough, and never a wrong one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli import invoke
from hub_packs import make_pack
from object_stores import FaultyStore, failing
from places import ROOT

from d3pack import D3MDataset, hub
from d3pack.errors import D3MError, InvalidPackError, NotFoundError, StorageError, UsageError
from d3pack.format import Pack, pack_bytes, read, write

PACK = make_pack()
DATA = pack_bytes(PACK)
KEY, URL = "bucket/sets/a.d3m", "faulty://bucket/sets/a.d3m"
LARGE = make_pack(200, full=False)


def part_of(pack: Pack, classes: list[int]) -> Pack:
    return replace(pack.select(classes), probes=None)


def pack_or_error(call: Callable[[str], Pack]) -> Pack | D3MError:
    try:
        return call(URL)
    except D3MError as error:
        return error


def test_pack_is_read_from_a_store(faulty: type[FaultyStore]) -> None:
    faulty.objects[KEY] = DATA
    assert hub.load(URL) == PACK
    assert hub.load_named(URL) == ("a.d3m", PACK)
    assert faulty.calls.count("read") == 2  # a small pack: the beginning, then the rest
    dataset = D3MDataset(URL, device="cpu", cache=None)
    assert (dataset.root, dataset.classes) == (PACK.root, list(PACK.classes))
    assert hub.is_remote(URL)
    with pytest.raises(NotFoundError, match=r"no object faulty://bucket/sets/b\.d3m"):
        hub.load("faulty://bucket/sets/b.d3m")


def test_info_and_classes_read_a_part_only(faulty: type[FaultyStore]) -> None:
    faulty.objects[KEY] = data = pack_bytes(LARGE)
    info = hub.remote_info(URL)
    assert info.outline.classes == LARGE.classes
    assert str(info.address) == f"{URL}#sha256={LARGE.root}"
    assert info.received < len(data) / 2
    faulty.calls.clear()
    assert hub.read_classes(URL, [7, "class 0150"]) == part_of(LARGE, [7, 150])
    assert "write" not in faulty.calls
    assert hub.read_classes(URL, range(200)) == LARGE
    assert D3MDataset(URL, classes=[3, 4], device="cpu").pack == part_of(LARGE, [3, 4])
    with pytest.raises(UsageError, match="no class 'none'"):
        hub.read_classes(URL, ["none"])


def test_pull_says_that_a_store_needs_none() -> None:
    with pytest.raises(UsageError, match="in an object store, not on the Hub"):
        hub.pull(URL)


def test_pin_is_checked(faulty: type[FaultyStore]) -> None:
    faulty.objects[KEY] = DATA
    assert hub.load(f"{URL}#sha256={PACK.root}") == PACK
    other = f"{URL}#sha256={'0' * 64}"
    for call in (hub.load, hub.remote_info, lambda url: hub.read_classes(url, [0])):
        with pytest.raises(StorageError, match="is a valid pack, but its root is") as caught:
            call(other)
        assert caught.value.code == "E_STORAGE_PIN"
    with pytest.raises(UsageError, match="invalid pin"):
        hub.load(f"{URL}#sha256=abc")


def test_name_may_hold_a_number_sign(faulty: type[FaultyStore]) -> None:
    faulty.objects["bucket/a#1.d3m"] = DATA
    assert hub.load(f"faulty://bucket/a#1.d3m#sha256={PACK.root}") == PACK
    assert hub.load("faulty://bucket/a#1.d3m") == PACK


@pytest.mark.parametrize("data", [b"", b"<html>no</html>", DATA[:-1], DATA + b"0", DATA[:40]])
def test_object_that_is_no_pack_is_refused(faulty: type[FaultyStore], data: bytes) -> None:
    faulty.objects[KEY] = data
    with pytest.raises(InvalidPackError):
        hub.load(URL)


def test_large_object_that_is_no_pack_is_not_downloaded(faulty: type[FaultyStore]) -> None:
    faulty.objects[KEY] = DATA + bytes(10 << 20)
    with pytest.raises(InvalidPackError, match="bytes after the data"):
        hub.load(URL)
    assert faulty.calls.count("read") == 1


def test_object_that_is_replaced_between_two_reads_is_refused(faulty: type[FaultyStore]) -> None:
    """Each byte of both packs may meet those of the other; only whole packs are returned."""
    packs = [make_pack(200, seed=seed, full=False) for seed in (1, 2)]
    first, second = map(pack_bytes, packs)
    assert len(first) == len(second)
    for reads in range(1, 5):
        for call in (hub.load, lambda url: hub.read_classes(url, [5, 190])):
            faulty.objects[KEY] = first
            seen = iter(range(100))

            def replaced(name: str, key: str, left: int = reads, seen: object = seen) -> None:
                if name == "read" and next(seen) == left:  # type: ignore[call-overload]
                    faulty.objects[KEY] = second

            faulty.fault = staticmethod(replaced)
            outcome = pack_or_error(call)
            if isinstance(outcome, Pack):
                assert outcome in (packs[0], part_of(packs[0], [5, 190]))
            else:
                assert outcome.code == "E_STORAGE_BYTES"


def test_faulty_store_gives_the_same_pack_or_an_error(faulty: type[FaultyStore]) -> None:
    data = pack_bytes(LARGE)
    whole = {"load": 0, "part": 0, "error": 0}
    for seed in range(60):
        rng = random.Random(seed)

        def fault(name: str, key: str, rng: random.Random = rng) -> bytes | None:
            kind = rng.random()
            if kind < 0.2:
                raise rng.choice([TimeoutError(), ConnectionResetError(), OSError(16, "SlowDown")])
            if name == "read" and kind < 0.3:
                return data[: rng.randrange(100)]
            if name == "read" and kind < 0.35:
                return rng.randbytes(1 << 16)  # what a broken proxy says
            return None

        faulty.objects[KEY] = data
        faulty.fault = staticmethod(fault)
        for name, call, expected in (
            ("load", hub.load, LARGE),
            ("part", lambda url: hub.read_classes(url, [1, 150]), part_of(LARGE, [1, 150])),
        ):
            outcome = pack_or_error(call)
            if isinstance(outcome, Pack):
                assert outcome == expected
                whole[name] += 1
            else:
                broken = isinstance(outcome, InvalidPackError)
                assert broken or outcome.code in ("E_STORAGE_BUSY", "E_STORAGE_BYTES")
                assert "\n" not in str(outcome)
                whole["error"] += 1
    assert min(whole.values()) > 5


def test_pack_is_written_in_one_piece(faulty: type[FaultyStore]) -> None:
    write(PACK, URL)
    assert faulty.objects == {KEY: DATA}
    assert faulty.calls == ["write"]
    faulty.fault = failing(9, PermissionError(), "write")
    with pytest.raises(StorageError):
        write(make_pack(seed=2), URL)
    assert faulty.objects == {KEY: DATA}


def test_commands_take_addresses(faulty: type[FaultyStore], tmp_path: Path) -> None:
    faulty.objects[KEY] = DATA
    file = tmp_path / "a.d3m"
    file.write_bytes(DATA)
    for words in (["info", "--format", "json"], ["verify"], ["verify", "--format", "json"]):
        there, here = (invoke(*words, where) for where in (URL, str(file)))
        assert there.exit_code == here.exit_code == 0
        assert there.stdout.replace(URL, "") == here.stdout.replace(str(file), "")
    assert invoke("diff", URL, file).exit_code == 0
    assert invoke("info", f"{URL}x").exit_code == 5
    faulty.fault = failing(99, PermissionError("hush"))
    result = invoke("info", URL)
    assert result.exit_code == 6
    assert "E_STORAGE_ACCESS" in result.stderr
    assert "hush" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.e2e
def test_pack_in_a_bucket_is_used_like_a_file(any_bucket: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / "cifar10.d3m"
    pack, url = read(file), f"{any_bucket}/sets/cifar10.d3m"
    write(pack, url)
    pinned = f"{url}#sha256={pack.root}"
    assert hub.load(url) == hub.load(pinned) == pack
    there, here = (D3MDataset(one, device="cpu", cache=None, quiet=True) for one in (pinned, file))
    assert there[3][0].equal(here[3][0])
    assert hub.read_classes(url, ["cat"]).classes == ("cat",)
    sheet = tmp_path / "sheet.png"
    words = ("--most-classes", "1", "--ipc", "1", "--device", "cpu")
    assert invoke("preview", url, "-o", sheet, *words).exit_code == 0
    assert sheet.stat().st_size > 1000
    assert invoke("verify", url, pinned).exit_code == 0
    assert invoke("info", f"{any_bucket}/none.d3m").exit_code == 5
