"""Shards of an export: they need nothing of each other, and leave the folder of a single call."""

from __future__ import annotations

import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli import invoke
from forks import Forks, Run
from tiny_backbones import tiny_pack, tiny_sd

import d3pack
from d3pack.decode import Decoder, ExportSettings, class_folders, export_images
from d3pack.decode.export import _Export
from d3pack.decode.pairs import Pairs
from d3pack.decode.settings import Layout
from d3pack.decode.tree import Tree
from d3pack.errors import NoSpaceError, UsageError
from d3pack.system import Shard, lock

IMAGES = 8  # of each of three classes
LAYOUTS: list[Layout] = ["folder", "webdataset", "parquet", "npz"]
IMAGENET = 1_281_167


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    d3pack.write(tiny_pack(tiny_sd(root / "sd"), images=IMAGES), root / "small.d3m")
    return root


@pytest.fixture(scope="module")
def decoder(world: Path) -> Iterator[Decoder]:
    with Decoder(d3pack.read(world / "small.d3m"), path=world / "sd") as decoder:
        yield decoder


@pytest.fixture(scope="module")
def whole(world: Path, decoder: Decoder) -> dict[str, dict[str, bytes]]:
    """The files of an export without shards, by layout."""
    for layout in LAYOUTS:
        export_images(decoder, world / layout, settings(layout))
    return {layout: content(world / layout) for layout in LAYOUTS}


def settings(layout: Layout) -> ExportSettings:
    return ExportSettings(layout, shard_size=5)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_write_the_files_of_a_single_call(
    layout: Layout, count: int, decoder: Decoder, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    shards = [Shard(number, count) for number in range(count, 0, -1)]
    done = [export_images(decoder, tmp_path, settings(layout), shard=s) for s in shards]
    assert content(tmp_path) == whole[layout]
    assert sum(report.images for report in done) == sum(report.decoded for report in done) == 24
    assert count == 1 or max(report.images for report in done) < 24
    last = export_images(decoder, tmp_path, settings(layout))
    assert (last.images, last.decoded) == (24, 0)
    assert content(tmp_path) == whole[layout]


def test_no_group_of_a_tree_is_decoded_twice(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[Any]] = []
    decode = decoder._decode

    def watched(padded: list[Any], *rest: Any) -> Any:
        groups.extend(padded)
        return decode(padded, *rest)

    monkeypatch.setattr(decoder, "_decode", watched)
    for number in range(1, 4):
        export_images(decoder, tmp_path, shard=Shard(number, 3), images_per_class=6)
    assert decoder.group == 4
    assert sorted(groups) == [
        [(n // 6, n % 6) for n in range(g, g + 4)] for g in range(0, 16, 4)
    ] + [[(2, 4), (2, 5), (2, 5), (2, 5)]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_without_shard_does_what_is_missing(
    layout: Layout, decoder: Decoder, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    mine = export_images(decoder, tmp_path, settings(layout), shard=Shard(2, 3))
    (tmp_path / ".d3pack-shard-1-of-3.lock").touch()  # what a killed shard leaves
    (tmp_path / ".d3pack-0123.part").write_bytes(b"half")
    rest = export_images(decoder, tmp_path, settings(layout))
    assert rest.decoded == 24 - mine.decoded
    assert content(tmp_path) == whole[layout]


@pytest.mark.parametrize("layout", ["folder", "npz"])
def test_an_interrupted_shard_goes_on(
    layout: Layout, decoder: Decoder, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_images(decoder, tmp_path, settings(layout), shard=Shard(1, 2), progress=stop)
    again = export_images(decoder, tmp_path, settings(layout), shard=Shard(1, 2))
    assert 0 < again.decoded <= again.images
    assert layout == "npz" or again.decoded < again.images
    export_images(decoder, tmp_path, settings(layout), shard=Shard(2, 2))
    assert content(tmp_path) == whole[layout]


def test_shards_share_a_folder_and_keep_out_their_like(decoder: Decoder, tmp_path: Path) -> None:
    plan, entered = settings("webdataset"), list[int]()

    def intrude(done: int, total: int) -> None:
        if entered:
            return
        entered.append(done)
        half = tmp_path / ".d3pack-living.part"
        half.write_bytes(b"being written")
        assert export_images(decoder, tmp_path, plan, shard=Shard(2, 3)).decoded == 9
        assert half.exists()
        with pytest.raises(UsageError, match="another process is writing shard 1/3"):
            export_images(decoder, tmp_path, plan, shard=Shard(1, 3))
        with pytest.raises(UsageError, match="another export is writing"):
            export_images(decoder, tmp_path, plan)
        with pytest.raises(UsageError, match="holds another export"):
            export_images(decoder, tmp_path, ExportSettings("npz"), shard=Shard(2, 3))

    export_images(decoder, tmp_path, plan, shard=Shard(1, 3), progress=intrude)
    assert entered
    with (
        lock(tmp_path / ".d3pack-export.json"),
        pytest.raises(UsageError, match="another export is writing"),
    ):
        export_images(decoder, tmp_path, plan, shard=Shard(3, 3))


def test_shards_refuse_a_folder_of_other_files(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        export_images(decoder, tmp_path, shard=Shard(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.e2e
def test_processes_at_the_same_time_and_a_killed_one(
    world: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    words = ("decode", world / "small.d3m", "--backbone", world / "sd", "--to")
    with Forks() as forks:

        def start(layout: Layout, *more: str) -> Run:
            out = ("-o", tmp_path / layout, "--shard-size", "5")
            return forks.start(*words, layout, *out, *more, cwd=world)

        for layout in ("folder", "webdataset"):
            running = [start(layout, "--shard", f"{number}/2") for number in (1, 2)]
            for run in running:
                code, out, err = run.result()
                assert code == 0, err
                assert "images of shard" in out
            assert content(tmp_path / layout) == whole[layout]

        killed = start("parquet", "--shard", "1/2")
        killed.until(lambda: list((tmp_path / "parquet").glob("*.part")))
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.result()[0] == -signal.SIGKILL
        assert content(tmp_path / "parquet").keys() > {".d3pack-shard-1-of-2.lock"}
        for more in (("--shard", "2/2"), ("--shard", "1/2"), ()):
            assert start("parquet", *more).result()[0] == 0
        assert content(tmp_path / "parquet") == whole["parquet"]


@pytest.mark.parametrize("text", ["3", "0/8", "9/8", "a/b", "1/2/3"])
def test_bad_shards_are_one_line(text: str, world: Path, tmp_path: Path) -> None:
    result = invoke("decode", world / "small.d3m", "-o", tmp_path / "out", "--shard", text)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"invalid --shard {text!r}: expected NUMBER/COUNT, as 3/8" in result.stderr
    assert not (tmp_path / "out").exists()


def test_pairs_are_counted_class_by_class() -> None:
    pairs = Pairs([4, 2, 7], 3)
    plain = [(c, i) for c in (4, 2, 7) for i in range(3)]
    assert list(pairs) == plain
    assert [pairs[n] for n in range(-9, 9)] == plain + plain
    assert [list(pairs[a:b]) for a, b in ((2, 7), (8, 99), (-3, None))] == [
        plain[2:7],
        plain[8:],
        plain[-3:],
    ]
    assert list(pairs.some(torch.tensor([8, 1]).numpy())[:2]) == [plain[8], plain[1]]
    with pytest.raises(IndexError):
        pairs[9]


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_a_million_images_are_planned_in_little_memory(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model: what an export of ImageNet's size costs before and beside decoding."""
    pack = SimpleNamespace(classes=[f"class {c}" for c in range(986)])
    pairs, handed = Pairs(range(986), 1300), list[int]()
    assert len(pairs) >= IMAGENET
    decoder: Any = SimpleNamespace(pack=pack, group=16, watched=lambda passed: nullcontext())
    export = _Export(decoder, tmp_path, ExportSettings(layout), pairs, Shard(2, 3), None)

    def hand_out(part: Iterable[Any]) -> None:
        handed.append(sum(1 for _ in part))

    monkeypatch.setattr(export, "_write_tar", lambda file, part: hand_out(part))
    tracemalloc.start()
    began = time.process_time()
    if layout == "folder":
        tree = Tree(tmp_path, class_folders(pack.classes), "png", pairs, export._units, 16)
        assert tree.present() == 0
        hand_out(tree.missing())
    else:
        export.write()
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(handed) == export.images
    assert abs(export.images - len(pairs) / 3) <= 1024
    assert peak < 32 << 20
    assert export.images / seconds > 20_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_pack_of_many_images_neither_hangs_nor_fills_memory(
    layout: Layout, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = replace(d3pack.read(world / "small.d3m"), images_per_class=2**24, probes=None)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) % 4 == 0:
            raise KeyboardInterrupt

    with Decoder(pack, path=world / "sd") as decoder:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**9))
        with pytest.raises(NoSpaceError, match=r"50,331,648 images take 5\.03 GB at least"):
            export_images(decoder, tmp_path / "out", settings(layout))
        assert not (tmp_path / "out").exists(), "refused before anything is written"
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**15))
        began = time.process_time()
        tracemalloc.start()
        plan = settings(layout)
        for shard in (None, Shard(2, 3), None):
            with pytest.raises(KeyboardInterrupt):
                export_images(decoder, tmp_path / "out", plan, shard=shard, progress=stop)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert {seen[0][1], seen[-1][1]} == {3 << 24}
    assert abs(seen[4][1] - 2**24) <= 5
    assert layout != "folder" or seen[-1][0] > seen[0][0] + 12, "what was there is kept"
    assert peak < 40 << 20  # a byte for each image of one class, and a model's activations
    assert time.process_time() - began < 30


def test_stream_hands_out_a_million_images_as_they_are_needed(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(groups: list[Any], *_: Any) -> list[Any]:
        return [torch.zeros(len(group), 3, 1, 1, dtype=torch.uint8) for group in groups]

    monkeypatch.setattr(decoder, "_decode", nothing)
    monkeypatch.setattr(decoder, "group", 16)
    items = ((n % 3, n % IMAGES) for n in range(IMAGENET))
    began = time.perf_counter()
    for (_, images), _ in zip(decoder.stream(items), range(2000), strict=False):
        assert len(images) == 16
    assert 2000 * 16 / (time.perf_counter() - began) > 20_000
    assert len(list(items)) >= IMAGENET - 2100 * 16, "read as they were needed"
