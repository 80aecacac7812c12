"""Every verb that writes, on a disk that is full, then has a little more room, then more.

What has no room ends in NoSpaceError without half a file; the bytes are those of an undisturbed
run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import SHORT, quick
from full_disk import Disk, disk
from PIL import Image

import d3pack
from d3pack.encode import encode, encode_shard
from d3pack.errors import D3MError
from d3pack.system import Shard, WaitingError

__all__ = ["disk"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(home: Path) -> Path:
    """A pack to decode, its prompts as embedding files, and the parts of one to merge."""
    encode(home / "source", home / "made.d3m", quick(home / "sd", labels="top2"))
    done = invoke(*words_of("export-embeddings", home, home))
    assert done.exit_code == 0, done.output
    left = [Shard(1, 2), Shard(2, 2)]
    while left:
        for shard in list(left):
            with suppress(WaitingError):
                encode_shard(home / "source", home / "m.d3m", shard, quick(home / "sd"))
                left.remove(shard)
    return home


def whole(path: Path) -> bytes:
    """Return the bytes of a file, which must be complete."""
    data = path.read_bytes()
    if path.suffix == ".d3m":
        d3pack.read(data)
    elif path.suffix in {".png", ".webp"}:
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            assert [arrays[name] is not None for name in arrays.files]
    elif path.suffix == ".html":
        assert data.rstrip().endswith(b"</html>")
    elif path.suffix == ".parquet":
        assert data[-4:] == b"PAR1"
    return data


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a person sees in a folder, work directories left out; nothing is half-written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): whole(path)
        for path in files
        if not any(part.startswith(".") or part.endswith(".work") for part in path.parts[-3:])
    }


def words_of(verb: str, made: Path, out: Path) -> list[object]:
    """Return the words of a call that writes into a folder."""
    pack, backbone = made / "made.d3m", ("--backbone", made / "sd")
    kind, _, layout = verb.partition(" ")
    match kind:
        case "decode":
            form = ("--to", layout, "--shard-size", "3")
            return ["decode", pack, "-o", out / "images", *backbone, *form]
        case "preview":
            return ["preview", pack, "-o", out / "page.html", *backbone]
        case "export-embeddings":
            return ["export-embeddings", pack, "-o", out / "toys", *backbone]
        case "import-embeddings":
            sentence = ("--template", "a photo of a {}")
            return ["import-embeddings", made / "toys", "-o", out / "t.d3m", *backbone, *sentence]
        case "merge":
            return ["merge", made / "m.d3m.parts", "-o", out / "m.d3m"]
        case "code":
            size = ("--bytes-per-image", "8")
            return ["code", made / "source", "-o", out / "c.d3m", *backbone, *size]
    return ["encode", made / "source", "-o", out / "x.d3m", *backbone, *SHORT]


VERBS = (
    "decode folder", "decode webdataset", "decode parquet", "decode npz", "preview",
    "export-embeddings", "import-embeddings", "encode", "merge", "code",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full_at_every_size(
    verb: str, made: Path, disk: Disk, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    done = invoke(*words_of(verb, made, plain))
    assert done.exit_code == 0, done.output

    def error() -> BaseException | None:
        done = invoke(*words_of(verb, made, disk.path))
        contents(disk.path)
        return None if done.exit_code == 0 else done.exception

    refused = disk.grow_until(error)
    assert refused > 0
    assert contents(disk.path) == contents(plain)


SURROUNDINGS: dict[str, Callable[[Path], dict[str, str | None]]] = {
    "HOME unset": lambda path: {"HOME": None},
    "HOME missing": lambda path: {"HOME": str(path / "none")},
    "HOME not a folder": lambda path: {"HOME": "/dev/null"},
    "a home on a full or read-only disk": lambda path: {"HOME": "/proc/self"},
    "locale C": lambda path: {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0"},
    "no environment": lambda path: dict.fromkeys(os.environ, None),
}


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_odd_surroundings_cost_no_traceback(case: str, made: Path, tmp_path: Path) -> None:
    environment: dict[str, str | None] = dict(os.environ)
    environment |= {"D3PACK_HOME": None, "XDG_CACHE_HOME": None, "HF_HOME": None}
    environment |= SURROUNDINGS[case](tmp_path)
    environment["PYTHONPATH"] = str(Path(d3pack.__file__).parents[1])
    given = {name: value for name, value in environment.items() if value is not None}
    train = f"""
from d3pack import D3MDataset
dataset = D3MDataset({str(made / "made.d3m")!r}, backbone={str(made / "sd")!r}, device="cpu")
print(dataset[0][0].shape, len(dataset))
"""
    for words in (
        ["-m", "d3pack", "info", str(made / "made.d3m")],
        ["-m", "d3pack", *map(str, words_of("decode folder", made, tmp_path))],
        ["-c", train],
    ):
        done = subprocess.run(
            [sys.executable, *words], env=given, cwd=tmp_path, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"Traceback" not in done.stderr


def test_a_teacher_is_kept_with_the_work_where_no_cache_can_be_written(
    made: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "HOME": "/proc/self"}
    for name in ("D3PACK_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        environment.pop(name, None)
    words = [str(word) for word in words_of("encode", made, tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "d3pack", *words],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot be written: the teacher is kept with this work" in done.stderr
    (tmp_path / "plain").mkdir()
    assert invoke(*words_of("encode", made, tmp_path / "plain")).exit_code == 0
    assert d3pack.read(tmp_path / "x.d3m").root == d3pack.read(tmp_path / "plain/x.d3m").root


@pytest.mark.parametrize("verb", [*VERBS, "D3MDataset"])
def test_a_clock_that_jumps_changes_nothing(
    verb: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backwards by a day, forwards by ten years: times of files and of messages are no input."""
    import time

    def result(out: Path) -> dict[str, bytes]:
        out.mkdir()
        if verb == "D3MDataset":
            monkeypatch.setenv("D3PACK_HOME", str(out / "home"))
            for _ in range(2):  # the second one reads what the first one stored
                dataset = d3pack.D3MDataset(
                    made / "made.d3m", backbone=made / "sd", device="cpu", cache="disk", quiet=True
                )
                images = torch.stack([image for image, _ in dataset])
            return {"images": images.numpy().tobytes()}
        done = invoke(*words_of(verb, made, out))
        assert done.exit_code == 0, done.output
        return contents(out)

    plain = result(tmp_path / "plain")
    now, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return now() + (0, -86_400, 3.2e8)[calls[0] % 3]

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    assert result(tmp_path / "again") == plain


def test_errors_have_one_line(made: Path, disk: Disk) -> None:
    disk.resize(4096)
    done = invoke(*words_of("decode folder", made, disk.path))
    assert isinstance(done.exception, D3MError)
    assert "\n" not in str(done.exception)
