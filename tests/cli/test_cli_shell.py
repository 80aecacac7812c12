"""The command in a shell: completion, pipes, colours, slips of the finger."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from places import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.posix]

PACK = ROOT / "examples" / "cifar10.d3m"
SCRIPTS = sysconfig.get_path("scripts")
ESCAPE = "\x1b["


class Terminal:
    """A program in a terminal of its own: what is typed, and what appears."""

    def __init__(self, command: list[str], **env: str) -> None:
        import pty

        self.pid, self._fd = pty.fork()
        if self.pid == 0:  # the child
            os.execvpe(command[0], command, {**os.environ, **env})
        self.screen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def see(self, words: str, seconds: float = 60) -> str:
        """Wait until the words appear; what appeared since the last look."""
        end = time.monotonic() + seconds
        seen = ""
        while words not in seen:
            assert time.monotonic() < end, f"no {words!r} on the screen:\n{self.screen}"
            if select.select([self._fd], [], [], 0.2)[0]:
                new = os.read(self._fd, 4096).decode(errors="replace")
                seen += new
                self.screen += new
        return seen


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    settings = {
        "HOME": str(tmp_path),
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        "PS1": "ready> ",
        "TERM": "dumb",
    }
    with Terminal(["bash", "--norc", "-i"], **settings) as bash:
        bash.see("ready> ")
        bash.type("d3pack --install-completion\n")
        bash.see("completion installed")
        bash.see("ready> ")
        bash.type(". ~/.bashrc\n")
        bash.see("ready> ")
        bash.type("d3pack enc\t")
        bash.see("encode ")
        bash.type("photos --dry\t")
        bash.see("--dry-run ")
        bash.type("\x15d3pack cache ver\t")
        bash.see("verify ")


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    """rich draws the table of `eval` and the bars; help is plain text anyway."""
    program = """
from d3pack.system import progress_bar
with progress_bar("decoding") as progress:
    progress(1, 2)
print("the end")
"""
    command = [sys.executable, "-c", program]
    with Terminal(command, TERM="xterm") as coloured:
        coloured.see("the end")
        assert re.search(r"\x1b\[(3[0-8]|9[0-7])[;m]", coloured.screen)
    with Terminal(command, TERM="xterm", NO_COLOR="1") as plain:
        screen = plain.see("the end")
        assert "50%" in screen or "1/2" in screen
        for colour in (*range(30, 50), *range(90, 98)):
            assert f"{ESCAPE}{colour}" not in screen
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ESCAPE not in piped.stdout + piped.stderr


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["evn"], "env"),
        (["encode", "photos", "--budgte", "9KB"], "--budget"),
        (["decode", "x.d3m", "-o", "y", "--clases", "3"], "--classes"),
        (["cache", "lss"], "ls"),
        (["preview", "x.d3m", "-o", "x.png", "--most-class", "3"], "--most-classes"),
    ],
)
def test_a_slip_of_the_finger_is_answered_with_the_near_name(args: list[str], near: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d3pack", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    last = done.stderr.rstrip().splitlines()[-1]
    hint = re.search(r"did you mean(.*)", last)
    assert hint is not None, done.stderr
    assert near in hint[1]
    assert done.stdout == ""


@pytest.mark.parametrize("form", ["human", "json", "quiet"])
def test_info_says_the_same_with_and_without_the_parser(form: str) -> None:
    """`info FILE` is answered without click; with a format it goes through it."""
    plain, parsed = (
        subprocess.run(
            [sys.executable, "-m", "d3pack", "info", str(PACK), *how],
            capture_output=True,
            text=True,
            check=True,
        )
        for how in ([] if form == "human" else ["--format", form], [f"--format={form}"])
    )
    assert plain.stdout == parsed.stdout
    assert plain.stdout


def test_a_reader_that_leaves_early_is_no_failure_of_ours() -> None:
    """`d3pack info x | head -1`, and the table is larger than what was read."""
    read, write = os.pipe()
    os.close(read)  # it has left already
    try:
        done = subprocess.run(
            [sys.executable, "-m", "d3pack", "info", str(PACK)],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("where", "words"), [(">&-", "closed"), ("> /dev/full", "No space left")])
@pytest.mark.parametrize("how", ["", "--format=json"])
def test_a_closed_or_full_output_ends_in_one_line(where: str, words: str, how: str) -> None:
    if where.endswith("full") and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    line = f"{sys.executable} -m d3pack info {PACK} {how} {where}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("d3pack: [E_D3M]")
    assert words in said


def test_a_closed_error_output_keeps_no_one_from_the_result() -> None:
    line = f"{sys.executable} -m d3pack info {PACK} 2>&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "d3m 1.0" in done.stdout
