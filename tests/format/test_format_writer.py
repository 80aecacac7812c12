"""Writing: one Pack, one sequence of bytes; whole or not at all; modes as they should be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_packs import full, make, stored
from places import HELPERS

import d3pack
from d3pack import Coded, Recipe
from d3pack.errors import D3MError, InvalidPackError, NoSpaceError, NotFoundError, UsageError
from d3pack.format.codecs import encode_picks
from d3pack.testing import raises_code


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes, bytes]:
    folder = tmp_path_factory.mktemp("crash")
    old, new = d3pack.pack_bytes(make(3)), d3pack.pack_bytes(make(4))
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    (folder / "work").mkdir()
    args = [folder / "work", folder / "old", folder / "new"]
    got = subprocess.run(
        [sys.executable, HELPERS / "format_crash.py", *args],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(got.stdout), old, new


@pytest.mark.posix
@pytest.mark.e2e
def test_writer_keeps_the_old_or_the_new_file_after_a_crash(crashes: Any) -> None:
    cases, old, new = crashes
    for case in cases:
        left = bytes.fromhex(case["left"])
        assert left in ((old if case["exists"] else b""), new), case["at"]
        if case["exit"] == 0:
            assert left == new
    steps = {
        kind: sum(case["kind"] == kind for case in cases) for kind in ("kill", "space", "limit")
    }
    assert steps["kill"] == steps["space"] >= 2 * 10, "open, writes, chmod, fsync, rename, fsync"
    assert steps["limit"] >= 6


@pytest.mark.e2e
@pytest.mark.posix
def test_writer_raises_and_leaves_no_temporary_when_the_disk_is_full(crashes: Any) -> None:
    cases, *_ = crashes
    for case in cases:
        last = case["exit"] == 0
        if case["kind"] == "kill":
            assert case["exit"] in (-9, 0)
            continue
        assert case["exit"] in (1, 0), "an OSError must come out as D3MError"
        if not last:
            # After the rename the new file is in place, and only the directory is not synced.
            assert case["temporaries"] == 0


def test_crashes_happen_before_and_after_the_rename(crashes: Any) -> None:
    cases, old, new = crashes
    killed = [
        bytes.fromhex(case["left"]) for case in cases if case["exit"] == -9 and case["exists"]
    ]
    assert old in killed
    assert new in killed, "a kill between the rename and the directory's fsync"


@pytest.mark.posix
def test_writer_sets_permissions_by_umask_or_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "x.d3m"
    before = os.umask(0o027)
    try:
        d3pack.write(make(), path)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        d3pack.write(make(3), path)
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ["x.d3m"]


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    packs = [make(classes) for classes in range(1, 9)]
    path = tmp_path / "x.d3m"
    threads = [threading.Thread(target=d3pack.write, args=(pack, path)) for pack in packs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert d3pack.read(path) in packs
    assert [p.name for p in tmp_path.iterdir()] == ["x.d3m"]


def test_full_disk_is_no_space_error_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.d3m"
    d3pack.write(make(3), path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match=r"no space left to write x\.d3m"):
        d3pack.write(make(4), path)
    assert d3pack.read(path) == make(3)
    assert [p.name for p in tmp_path.iterdir()] == ["x.d3m"]


def test_writer_refuses_missing_folders_and_invalid_names(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        d3pack.write(make(), tmp_path / "no" / "x.d3m")
    for name in (".", "/", "a\0b"):
        with pytest.raises(UsageError):
            d3pack.write(make(), name)
    (tmp_path / "folder.d3m").mkdir()
    with pytest.raises(D3MError):
        d3pack.write(make(), tmp_path / "folder.d3m")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.d3m"]


PROGRAM = """
import random, sys
sys.path[:0] = {paths}
from dataclasses import replace
import d3pack
from format_packs import full
def shuffled(value):
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return {{key: shuffled(item) for key, item in items}}
    return [shuffled(item) for item in value] if isinstance(value, (list, tuple)) else value
pack = full(provenance=shuffled({provenance!r}))
ref = pack.recipe.backbone
files = shuffled({{f"f{{i}}.json": d3pack.FileLock(i, "ab" * 32) for i in range(9)}})
recipe = replace(pack.recipe, backbone=replace(ref, files=files))
sys.stdout.buffer.write(d3pack.pack_bytes(replace(pack, recipe=recipe)))
"""


@pytest.mark.heavy
def test_equal_packs_have_equal_bytes_in_other_processes() -> None:
    facts = {f"k{i}": {"a": i, "b": [1.5, {"y": 0.1, "x": None}], "é": "猫"} for i in range(20)}
    program = PROGRAM.format(paths=[str(HELPERS)], provenance=facts)
    got = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(got) == 1
    assert d3pack.read(got.pop()).provenance["k3"]["a"] == 3


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"names": ("a", "a", "b", "c", "d")}, "E_NAME"),
        ({"names": ("a", "b\n", "c", "d", "e")}, "E_NAME"),
        ({"recipe": Recipe(make().recipe.backbone, (8, 8), "euler", (1.0, 2.0, 0.0))}, "E_RECIPE"),
        ({"picks": encode_picks(np.zeros((5, 6), int))}, "E_PICKS"),
        ({"ids": np.arange(5)}, "E_IDS"),
        ({"optional": {"Bad Name": 1}}, "E_MANIFEST"),
        ({"extensions": {"mood": Coded("x", {"rows": np.zeros((5, 1), np.uint8)})}}, "E_SECTION"),
    ],
)
def test_invalid_packs_are_not_written(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidPackError) as caught:
        d3pack.write(make(**change), tmp_path / "x.d3m")
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_empty_class_name_is_named() -> None:
    for names in (("",), ("a", "")):
        with raises_code("E_NAME", match="a class name is empty"):
            d3pack.pack_bytes(make(len(names), names=names))


@pytest.mark.parametrize(
    ("values", "shape", "shared"),
    [
        ({}, [2, 3, 40], ()),
        ({"values": np.zeros((5, 2, 3, 40), np.float16)}, [2, 3, 40], ("values",)),
        ({"values": np.zeros((5, 2, 3, 0), np.float16)}, [2, 3, 0], ()),
        ({"values": np.float16(1)}, [1, 1, 1], ("values",)),
    ],
)
def test_prompts_without_rows_are_refused(values: Any, shape: Any, shared: Any) -> None:
    prompts = Coded("f16", values, {"shape": shape}, frozenset(shared))
    with raises_code("E_CODEC"):
        d3pack.pack_bytes(replace(make(), prompts=prompts))


@pytest.mark.parametrize("shape", [(), (0,)])
def test_shared_bytes_without_length_are_refused(shape: tuple[int, ...]) -> None:
    mood = Coded("x", {"shared": np.zeros(shape, np.uint8)}, shared=frozenset({"shared"}))
    with raises_code("E_CODEC", match="mood"):
        d3pack.pack_bytes(make(optional={"mood": {}}, extensions={"mood": mood}))


def test_invalid_values_of_a_pack_are_refused() -> None:
    for change in (
        {"seed": -1},
        {"seed": 2**64},
        {"ids": [1.5]},
        {"provenance": {"x": object()}},
        {"provenance": {"x": float("nan")}},
        {"provenance": {1: 2}},
    ):
        with pytest.raises((UsageError, InvalidPackError)):
            d3pack.pack_bytes(make(**change))
    with pytest.raises(UsageError, match="first dimension"):
        d3pack.pack_bytes(make(picks=encode_picks(np.zeros((4, 6), int))))
    with pytest.raises(UsageError, match="dtype"):
        d3pack.pack_bytes(make(picks=Coded("lanes", {"codes": np.zeros((5, 6), np.float64)})))


def test_unknown_optional_features_are_written_back() -> None:
    unknown = Coded("odd", {"rows": np.arange(10, dtype=np.uint8).reshape(5, 2)}, {"z": [1, 0.5]})
    pack = full(optional={"captions": {"a": 1.0}}, extensions={"captions": unknown}, minor=9)
    data = d3pack.pack_bytes(pack)
    again = d3pack.read(data)
    assert d3pack.pack_bytes(again) == data
    assert d3pack.pack_bytes(replace(again, classes=again.classes)) == data
    assert again.minor == 9
    part = again.select([1])
    assert (part.minor, dict(part.optional), dict(part.extensions)) == (0, {}, {})


def test_big_endian_and_strided_arrays_give_the_same_pack() -> None:
    pack = full()
    turned = replace(
        pack,
        picks=Coded(
            "lanes",
            {"codes": np.asfortranarray(stored(pack.picks).tensors["codes"])},
            stored(pack.picks).params,
        ),
        prompts=Coded(
            "f16",
            {"values": stored(pack.prompts).tensors["values"].astype(">f2")},
            stored(pack.prompts).params,
        ),
    )
    assert d3pack.pack_bytes(turned) == d3pack.pack_bytes(pack)


@pytest.mark.posix
def test_writer_follows_links_and_refuses_pipes(tmp_path: Path) -> None:
    target, link, fifo = tmp_path / "real.d3m", tmp_path / "link.d3m", tmp_path / "pipe"
    d3pack.write(make(3), target)
    link.symlink_to(target)
    d3pack.write(make(4), link)
    assert link.is_symlink()
    assert d3pack.read(target) == make(4)
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="not a regular file"):
        d3pack.write(make(3), fifo)
    assert fifo.is_fifo()


def test_writer_takes_the_longest_file_name(tmp_path: Path) -> None:
    path = tmp_path / ("\u732b" * 80 + ".d3m")
    d3pack.write(make(3), path)
    assert d3pack.read(path) == make(3)
