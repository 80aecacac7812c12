"""Work directories in object stores: another machine finds what a killed process has sent."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from object_stores import SERVERS, FaultyStore, Servers, failing, faulty, new_bucket, store_servers

from d3pack.errors import NoSpaceError, StorageError, UsageError
from d3pack.system import BusyError, JournalError, ObjectPath, SharedFolder, mirror
from d3pack.system.journal import Checkpoint, Journal

__all__ = ["faulty", "store_servers"]
WORK = ObjectPath("faulty://bucket/x.d3m.work")
KEY = {"source": "abc"}


@pytest.fixture(autouse=True)
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(mirror, "_DEAD_SECONDS", 10.0)


@pytest.fixture(params=["faulty", *(pytest.param(name, marks=pytest.mark.e2e) for name in SERVERS)])
def store(
    request: pytest.FixtureRequest, store_servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectPath]:
    """A folder in memory, and one of each server program."""
    if request.param == "faulty":
        request.getfixturevalue("faulty")
        yield ObjectPath("faulty://bucket/deep")
        return
    with new_bucket(request.param, store_servers, monkeypatch) as url:
        yield ObjectPath(f"{url}/deep")


def names(folder: ObjectPath) -> set[str]:
    return set(folder.tree())


def test_another_machine_goes_on(store: ObjectPath) -> None:
    work = store / "x.d3m.work"
    first = Journal(work, KEY)
    first.record("one", {"a": [1, 2]})
    (first.path("vae") / "deep").mkdir(parents=True)
    (first.path("vae") / "deep" / "weights").write_bytes(b"w" * 100)
    (first.path("training/cache") / "photos").parent.mkdir()
    (first.path("training/cache") / "photos").write_bytes(b"made again")
    first.save("classes/000000", {"x": np.arange(6)}, {"note": "é"})
    (first.folder / "log.txt").write_text("said")
    assert names(work) == {
        "journal.json", "lease", "vae/deep/weights", "classes/000000.safetensors",
    }  # fmt: skip
    here = first.folder
    first.close()
    assert not here.exists()
    assert "log.txt" in names(work)
    assert "lease" not in names(work)

    second = Journal(work, KEY)
    assert second.begun
    assert second.folder != here
    assert second["one"] == {"a": [1, 2]}
    arrays, facts = second.load("classes/000000") or ({}, {})
    assert arrays["x"].tolist() == list(range(6))
    assert facts == {"note": "é"}
    assert (second.folder / "vae" / "deep" / "weights").read_bytes() == b"w" * 100
    assert (second.folder / "log.txt").read_text() == "said"
    second.drop("classes")
    second.record("two", 2)
    assert names(work) == {"journal.json", "lease", "log.txt", "vae/deep/weights"}
    second.close()


def test_a_restart_forgets_in_the_store_too(store: ObjectPath) -> None:
    work = store / "x.d3m.work"
    first = Journal(work, KEY)
    first.save("classes/000000", {"x": np.zeros(2)}, {})
    first.close()
    with pytest.raises(UsageError, match="the source has changed"):
        Journal(work, {"source": "other"})
    second = Journal(work, {"source": "other"}, restart=True)
    assert not second.has("classes/000000")
    assert names(work) == {"journal.json", "lease"}
    second.close()


def test_parts_see_what_others_have_sent(store: ObjectPath) -> None:
    parts = [store / "x.d3m.parts" / f"{number}-of-2" for number in (1, 2)]
    one = Journal(parts[0], KEY, parts=parts[1:])
    two = Journal(parts[1], KEY, parts=parts[:1])
    two.look()
    (one.path("backbone") / "vae").mkdir(parents=True)
    (one.path("backbone") / "vae" / "weights").write_bytes(b"w")
    one.save("codes/000000", {"x": np.ones(2)}, {})
    Checkpoint(one, "state").save({"x": np.ones(1)}, last=True)
    one.record("trained", True)
    assert "trained" not in two
    assert not two.has("codes/000000")
    two.look()
    assert two["trained"] is True
    assert two.has("codes/000000")
    assert not list(two.folder.parent.glob("**/000000.safetensors"))  # listed, not fetched
    stored = two.load("codes/000000")
    assert stored is not None
    assert stored[0]["x"].tolist() == [1, 1]
    folder = two.find("backbone")
    assert folder is not None
    assert (folder / "vae" / "weights").read_bytes() == b"w"
    assert Checkpoint(two, "state").load() is None
    one.save("codes/000000", {"x": np.zeros(3)}, {})  # more of it
    two.look()
    stored = two.load("codes/000000")
    assert stored is not None
    assert stored[0]["x"].tolist() == [0, 0, 0]
    one.close()
    two.close()
    other = Journal(parts[1], {"source": "other"}, restart=True, parts=parts[:1])
    with pytest.raises(UsageError, match="the part 1-of-2 was made with another source"):
        other.look()
    other.close()


def test_a_store_holds_what_its_facts_speak_of_whenever_it_fails(
    faulty: type[FaultyStore],
) -> None:
    """The write number N and all later ones fail, for every N; then another machine ends it."""
    for allowed in range(20):
        faulty.objects.clear()
        left = [allowed]

        def fault(call: str, key: str, left: list[int] = left) -> None:
            if call in ("write", "remove") and not key.endswith("/lease"):
                left[0] -= 1
                if left[0] < 0:
                    raise PermissionError

        faulty.fault = staticmethod(fault)
        with suppress(StorageError):
            work()
            break
        there = {name.partition(".d3m.work/")[2] for name in faulty.objects}
        facts = json.loads(faulty.objects.get("bucket/x.d3m.work/journal.json", b'{"facts": {}}'))
        for number in facts["facts"].get("done", []):
            assert f"files/{number}" in there
        faulty.fault = staticmethod(lambda call, key: None)
        assert work() == expected()
    else:
        raise AssertionError("it never ended")
    assert allowed > 6


def work() -> dict[str, bytes]:
    """Write three files and their facts, as far as they are missing; return what is there."""
    journal = Journal(WORK, KEY)
    try:
        for number in range(3):
            done = list(journal["done"]) if "done" in journal else []
            if number in done:
                continue
            journal.path(f"files/{number}").write_bytes(bytes([number]) * 9)
            journal.record("done", [*done, number])
        return {path.name: path.read_bytes() for path in (journal.folder / "files").iterdir()}
    finally:
        journal.close()


def expected() -> dict[str, bytes]:
    return {str(number): bytes([number]) * 9 for number in range(3)}


def test_calls_that_fail_for_the_moment_do_not_show(faulty: type[FaultyStore]) -> None:
    for call in ("write", "read", "ls", "info"):
        faulty.objects.clear()
        faulty.fault = failing(2, TimeoutError(), call)
        assert work() == expected()


def test_keeping_a_result_is_one_request(faulty: type[FaultyStore]) -> None:
    asked: list[tuple[str, str]] = []

    def fault(call: str, key: str) -> None:
        if not key.endswith("/lease"):
            asked.append((call, key.rpartition("/")[2]))

    journal = Journal(WORK, KEY)
    faulty.fault = staticmethod(fault)
    for number in range(3):
        journal.save(f"classes/{number}", {"x": np.zeros(2)}, {})
    journal.path("teacher").write_bytes(b"w")
    journal.record("taught", True)
    journal.drop("classes")
    faulty.fault = staticmethod(lambda call, key: None)
    journal.close()
    results = [f"{number}.safetensors" for number in range(3)]
    sent = [*results, "teacher", "journal.json"]
    assert asked[:5] == [("write", name) for name in sent]
    assert sorted(asked[5:]) == [("remove", name) for name in results]


def test_one_process_at_a_time(faulty: type[FaultyStore]) -> None:
    first = Journal(WORK, KEY)
    with pytest.raises(JournalError, match=r"another process works in x\.d3m\.work"):
        Journal(WORK, KEY)
    first.close()
    Journal(WORK, KEY).close()


def test_a_process_that_was_held_up_leaves_the_work_to_the_one_that_took_it_over(
    faulty: type[FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_BEAT_SECONDS", 1.5)  # as a laptop that sleeps
        slow = Journal(WORK, KEY)
        slow.record("one", 1)
        time.sleep(0.1)
    monkeypatch.setattr(mirror, "_DEAD_SECONDS", 0.5)
    began = time.monotonic()
    other = Journal(WORK, KEY)  # waits until the sign of life is old
    assert time.monotonic() - began >= 0.4
    assert other["one"] == 1

    def go_on() -> None:
        while time.monotonic() - began < 30:
            slow.send()
            time.sleep(0.1)

    with pytest.raises(JournalError, match=r"another process has taken x\.d3m\.work over"):
        go_on()
    slow.close()
    other.record("three", 3)
    assert "lease" in names(WORK)  # of the other
    other.close()
    assert "lease" not in names(WORK)


def test_a_process_that_wakes_up_looks_before_it_writes(
    faulty: type[FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a machine has slept, its threads wait on: the clock tells how long it was away."""
    monkeypatch.setattr(mirror, "_BEAT_SECONDS", 1000.0)
    slow = Journal(WORK, KEY)
    slow.record("one", 1)
    faulty.objects["bucket/x.d3m.work/lease"] = b'["another", 1]'
    slow.record("two", 2)  # a moment ago it was its own
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 3600)
    before = faulty.objects["bucket/x.d3m.work/journal.json"]
    with pytest.raises(JournalError, match=r"another process has taken x\.d3m\.work over"):
        slow.record("three", 3)
    slow.close()
    assert faulty.objects["bucket/x.d3m.work/journal.json"] == before


def test_a_turn_that_was_taken_over_sends_nothing(
    faulty: type[FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectPath("faulty://bucket/x.eval")
    shared = SharedFolder(store)

    def wait_too_long() -> None:
        with shared.opened(), shared.alone(shared.local / "teacher.lock"):
            (shared.local / "teacher").write_bytes(b"mine")
            faulty.objects["bucket/x.eval/teacher.lock"] = b'["another", 1]'
            time.sleep(0.5)

    with pytest.raises(BusyError, match="another process has taken teacher over"):
        wait_too_long()
    assert names(store) == {"teacher.lock"}  # of the other
    assert not shared.local.parent.exists()


def test_what_was_written_since_it_was_sent_is_not_fetched_over(faulty: type[FaultyStore]) -> None:
    shared = SharedFolder(ObjectPath("faulty://bucket/x.eval"))
    with shared.opened():
        file = shared.local / "seconds.json"
        for text in ("first", "second"):
            file.write_text(text)
            with shared.alone(shared.local / "turn.lock"):
                assert file.read_text() == text
            assert faulty.objects["bucket/x.eval/seconds.json"] == text.encode()
        faulty.objects["bucket/x.eval/seconds.json"] = b"of another"
        with shared.alone(shared.local / "turn.lock"):
            assert file.read_text() == "of another"


def test_a_full_disk_is_called_so(faulty: type[FaultyStore]) -> None:
    work()

    def fault(call: str, key: str) -> None:
        if call == "read" and key.endswith("journal.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    faulty.fault = staticmethod(fault)
    with pytest.raises(NoSpaceError, match="no space left to write"):
        work()


@pytest.mark.e2e
def test_marks_of_folders_are_no_files(bucket: str) -> None:
    """Consoles of stores make empty objects whose names end in a slash."""
    import fsspec

    folder = ObjectPath(f"{bucket}/x.d3m.work")
    client = fsspec.filesystem("s3")
    for name in ("", "classes/"):
        key = f"x.d3m.work/{name}"
        client.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")
    journal = Journal(folder, KEY)
    journal.save("classes/000000", {"x": np.zeros(2)}, {})
    journal.close()
    assert names(folder) == {"journal.json", "classes/000000.safetensors"}


def test_a_lease_lives_while_work_takes_long(faulty: type[FaultyStore]) -> None:
    first = Journal(WORK, KEY)
    found: list[str] = []

    def look() -> None:
        for _ in range(3):
            try:
                Journal(WORK, KEY).close()
            except JournalError as error:
                found.append(str(error))

    thread = Thread(target=look)
    thread.start()
    time.sleep(1.5)
    thread.join()
    first.record("one", 1)
    first.close()
    assert len(found) == 3


@pytest.mark.parametrize("restart", [False, True])
def test_objects_of_another_origin_stay(faulty: type[FaultyStore], restart: bool) -> None:
    faulty.objects["bucket/x.d3m.work/photos/cat.png"] = b"mine"
    with pytest.raises(JournalError, match=r"x\.d3m\.work holds files of another origin"):
        Journal(WORK, KEY, restart=restart)
    assert {*faulty.objects} == {"bucket/x.d3m.work/photos/cat.png"}


def test_what_is_fetched_is_removed_here(
    faulty: type[FaultyStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    work()
    assert not list(tmp_path.iterdir())
    faulty.fault = failing(9, PermissionError(), "read")
    with pytest.raises(StorageError):
        work()
    assert not list(tmp_path.iterdir())


def test_names_that_lead_out_of_the_folder_are_not_fetched(
    faulty: type[FaultyStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    work()
    for name in ("../../../out", f"/{tmp_path}/out", "a/../../../../out", "..\\out"):
        faulty.objects[f"bucket/x.d3m.work/{name}"] = b"bad"
    assert work() == expected()
    assert not list(tmp_path.glob("**/*out"))
