"""Progress: in place on a terminal, lines in a log, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from d3pack.system import (
    Events,
    StatusLine,
    json_lines,
    live_view,
    log_file,
    progress_bar,
    throttled,
)
from d3pack.system.progress import Listener, View, spark


def report(listeners: list[Listener]) -> None:
    events = Events(listeners)
    events.emit("plan", lines=["3 classes"])
    with events.stage("invert", 5, "rows"):
        for i in range(1, 6):
            events.step(i, samples=100 * i, loss=1.0 / i)
    events.note("all good")


def drawn(view: View) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def ticking(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))


def test_json_lines_and_log(tmp_path: Path) -> None:
    out = io.StringIO()
    report([json_lines(out), log_file(tmp_path / "log.txt", seconds=0)])
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["plan", "stage", *["step"] * 5, "stage-done", "note"]
    assert events[3] == {
        "event": "step", "stage": "invert", "done": 2, "total": 5, "samples": 200, "loss": 0.5,
    }  # fmt: skip
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(events)


def test_a_log_leaves_steps_out_but_for_one_now_and_then_and_the_last(tmp_path: Path) -> None:
    report([log_file(tmp_path / "log.txt")])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    steps = [line.partition(" done=")[2].split()[0] for line in lines if " step " in line]
    assert steps == ["1", "5"]
    assert len(lines) == 6


def test_the_live_view_shows_what_matters() -> None:
    view = View()
    report([view.listen])
    text = drawn(view)
    for part in (
        "3 classes",
        "invert",
        "5/5 rows",
        "all good",
        "loss 1.0000",
        "0.2000",
    ):
        assert part in text, part


def test_the_live_view_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run did does not count for the speed."""
    view = View()
    view.listen({"event": "stage", "stage": "invert", "total": 200, "unit": "rows"})
    ticking(monkeypatch, 5.0, 15.0, 25.0)
    view.listen({"event": "step", "done": 100, "total": 200})
    assert "left" not in drawn(view)
    view.listen({"event": "step", "done": 120, "total": 200})
    assert "120/200 rows 2.0 rows/s 0:00:40 left" in drawn(view)
    view.listen({"event": "step", "done": 120, "total": 200, "samples": 600})
    assert "30 samples/s" in drawn(view)


def test_the_live_view_shows_control_characters_of_notes() -> None:
    view = View()
    view.listen({"event": "note", "text": "a \x1b[31m class\nand a line"})
    text = drawn(view)
    assert "\x1b" not in text
    assert "a \\x1b[31m class" in text
    assert "and a line" in text


def test_the_live_view_has_a_row_for_each_stage_of_workers() -> None:
    view = View()
    for shard, stage in (("1/3", "train"), ("2/3", "look"), ("3/3", "write")):
        view.listen({"event": "stage", "stage": stage, "total": 9, "unit": "u", "shard": shard})
        view.listen({"event": "step", "stage": stage, "done": 4, "total": 9, "shard": shard})
        if stage == "look":
            view.listen({"event": "stage-done", "stage": stage, "seconds": 1.0})
    view.listen({"event": "step", "stage": "train", "done": 5, "total": 9, "shard": "1/3"})
    text = drawn(view)
    assert "train" in text
    assert "5/9 u" in text
    assert "write" in text
    assert "look" not in text  # it is over, and others have begun


def test_spark_falls() -> None:
    assert spark([3.0, 2.0, 1.0]) == "█▄▁"
    assert len(spark([float(i) for i in range(1000)])) <= 40
    assert spark([1.0, 1.0]) == "▁▁"


def test_a_run_in_a_log_has_a_line_a_stage_and_one_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with live_view() as listener:
        listener({"event": "plan", "lines": ["3 classes"]})
        ticking(monkeypatch, 0.0, 1.0, 21.0, 41.0, 51.0, 81.0)
        listener({"event": "stage", "stage": "invert", "total": 1000, "unit": "rows"})
        for done, loss in ((10, 4.0), (20, 3.0), (30, 2.5), (35, 2.0), (50, 1.0)):
            listener({
                "event": "step", "stage": "invert", "done": done, "total": 1000, "loss": loss
            })  # fmt: skip
        listener({"event": "stage-done", "stage": "invert", "seconds": 81.0})
        listener({"event": "note", "text": "all good"})
    assert capsys.readouterr().err.splitlines() == [
        "3 classes",
        "invert (1000 rows)",
        "invert: 30 of 1,000, loss 2.5000, 0.5 rows/s, 0:32:20 left",
        "invert: 50 of 1,000, loss 1.0000, 0.5 rows/s, 0:31:40 left",
        "all good",
    ]


def test_a_bar_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(monkeypatch, 0.0, 0.0, 10.0, 31.0, 40.0, 70.0)
    with progress_bar("decoding") as progress:
        for done in (0, 100, 310, 400, 700):
            progress(done, 1010)
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 310 of 1,010, 10.0 images/s, 0:01:10 left",
        "decoding: 700 of 1,010, 10.0 images/s, 0:00:31 left",
    ]


def test_a_throttled_counter_passes_on_now_and_then_and_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("d3pack.system.progress.time.monotonic", lambda: now[0])
    seen: list[int] = []
    counter = throttled(lambda done, total: seen.append(done))
    for done in range(1, 12):
        now[0] += 0.2
        counter(done, 11)
    assert seen == [3, 6, 9, 11]


def test_a_quiet_bar_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("decoding", quiet=True) as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_stays_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("pushing", unit="files") as progress:
        progress(1, 2)
    for part in ("pushing", "1/2 files"):
        assert part in terminal.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_status_line_counts_the_time_of_its_own_work(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream: Any = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    ticking(monkeypatch, 100.0, 110.0, 131.0, 140.0)
    line = StatusLine("d3pack: decoded", 100)
    line.add(10, 1.0, 10)  # too early
    line.add(30, 3.0, 40)
    line.add(10, 1.0, 50)
    line.add(20, 2.0, 70)
    line.add(30, 3.0, 100)
    text = stream.getvalue()
    assert "d3pack: decoded 40 of 100 images, 10.0 images/s, 0:00:06 left" in text
    assert ("decoded 50 of 100" in text) == terminal
    assert text.endswith("d3pack: decoded 100 of 100 images, 10.0 images/s\n")
    assert text.count("\n") == (1 if terminal else 3)


def test_a_status_line_of_work_that_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    StatusLine("d3pack: decoded", 100).add(16, 4.0, None)
    StatusLine("d3pack: decoded", 100, quiet=True).add(16, 4.0, None)
    assert capsys.readouterr().err == "d3pack: decoded 16 images, 4.0 images/s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_status_line_tells_of_the_parts_of_a_long_piece(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream: Any = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    ticking(monkeypatch, 100.0, 110.0, 131.0)
    line = StatusLine("d3pack: decoded", 5000)
    line.part(51, 1024, 5.0)  # too early
    line.part(0, 1024, 20.0)  # nothing is done yet
    line.part(256, 1024, 30.0)
    line.part(512, 1024, 40.0)
    line.part(768, 1024, 61.0)
    line.part(1024, 1024, 80.0)  # the piece tells of itself
    text = stream.getvalue()
    assert "d3pack: decoded 256 of the next 1,024 images, 0:01:30 left" in text
    assert ("decoded 512" in text) == terminal
    assert "decoded 768" in text
    assert "decoded 1,024" not in text


def test_the_share_of_all_parts_grows_from_stage_to_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    now = [100.0]
    monkeypatch.setattr("d3pack.system.progress.time.monotonic", lambda: now[0])
    with live_view() as listener:
        events = Events([listener])
        events.emit("estimate", seconds={"teacher": 10.0, "learning": 60.0, "images": 30.0})
        for part in ("teacher", "", "learning", "images"):
            with events.stage(f"stage {part}", 2, "steps", part=part):
                for done in range(3):
                    now[0] += 1.0
                    events.step(done)
    text = capsys.readouterr().err
    assert (
        "about 1 min 40 s on this machine (teacher 10 s, learning 1 min 00 s, images 30 s)" in text
    )
    shares = [
        int(line.rpartition(", ")[2].split(" %")[0])
        for line in text.splitlines()
        if line.endswith("% of all")
    ]
    assert shares == [5, 10, 10, 10, 40, 70, 85, 100]
