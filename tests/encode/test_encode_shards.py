"""Shards of an encoding: the pack does not depend on their number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from cli_schema import check_output
from encode_world import CLASSES, SHORT, make_tree, quick, settings_of
from tiny_backbones import tiny_dit

from d3pack.encode import EncodeSettings, encode, encode_shard, merge
from d3pack.encode.methods.d3m import one_pass
from d3pack.encode.parts import part_of
from d3pack.errors import NotFoundError, UsageError
from d3pack.system import JournalError, Shard, WaitingError


def parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def in_turn(
    home: Path, output: Path, settings: EncodeSettings, count: int, *, backwards: bool = False
) -> int:
    """Run all shards one after another, each as far as it comes; return how often it took."""
    left = [Shard(number, count) for number in range(1, count + 1)]
    if backwards:
        left.reverse()
    rounds = 0
    while left:
        rounds += 1
        before = list(left)
        for shard in before:
            # each on a machine of its own: they share nothing but the parts
            teachers = output.parent / f"{output.name}.teachers-{shard.number}"
            try:
                encode_shard(home / "source", output, shard, settings, teachers=teachers)
            except WaitingError:
                continue
            left.remove(shard)
        assert rounds < 30, left
    return rounds


def merged(output: Path, count: int, **more: Any) -> bytes:
    parts = [part_of(parts_folder(output), Shard(i + 1, count)) for i in range(count)]
    merge(parts[::-1], output, teachers=output.parent / "teachers-of-merge", **more)
    return output.read_bytes()


@pytest.fixture(scope="module")
def world(home: Path) -> Iterator[Path]:
    tiny_dit(home / "dit")
    with pytest.MonkeyPatch.context() as patch:  # where the fit leads is for another test
        patch.setattr(one_pass, "STATES", 12)
        patch.setattr(one_pass, "ROUNDS", 2)
        yield home


def settings_by_name(world: Path, name: str) -> EncodeSettings:
    sd = str(world / "sd")
    if name == "d3m":  # picks, measured guidance where there is one, codes, labels
        return quick(sd, codes=2, code_steps=3, code_bits=4)
    if name == "d3m without images":
        return quick(sd, candidates=1, labels="none", guidance=1.5)
    if name == "d3m with a fitted sampler":
        return quick(
            sd, candidates=1, labels="none", guidance=1.5, sampler_steps=None, fitted_steps=3
        )
    if name == "d3m in one pass":
        return quick(sd, candidates=1, labels="none", guidance=1.5, one_pass=True)
    if name == "codes":
        return settings_of(method="codes", backbone=sd, code_steps=3, code_bits=4)
    if name in ("s3", "draws"):
        return quick(sd, select=name, candidates=3, labels="none", modes=1, guidance=1.5)
    if name == "modes":
        return settings_of(
            method="modes", backbone=sd, images_per_class=3, sampler_steps=3, code_steps=3,
            code_bits=4, weigh=True,
        )  # fmt: skip
    if name == "minimax":
        return quick(str(world / "dit"), method="minimax", epochs=1, search_images=0)
    raise AssertionError(name)


@pytest.fixture(scope="module")
def wholes(world: Path) -> Callable[[str], bytes]:
    """Packs of runs without shards, each made once."""

    @cache
    def whole(name: str) -> bytes:
        output = world / f"{name.replace(' ', '-')}.d3m"
        encode(world / "source", output, settings_by_name(world, name))
        return output.read_bytes()

    return whole


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "d3m",
        "d3m without images",
        "d3m with a fitted sampler",
        pytest.param("d3m in one pass", marks=pytest.mark.slow),
        "codes",
        "minimax",
        "modes",
        "s3",
        "draws",
    ],
)
@pytest.mark.parametrize(
    "count", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 7))]
)
def test_shards_merge_to_the_bytes_of_a_whole_run(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes], name: str, count: int
) -> None:
    output = tmp_path / "x.d3m"
    in_turn(world, output, settings_by_name(world, name), count)
    assert merged(output, count) == wholes(name)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "modes",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("d3m", "codes", "minimax", "s3")),
    ],
)
def test_shard_without_a_class_may_come_first(
    world: Path, tmp_path: Path, wholes: Callable[[str], bytes], name: str
) -> None:
    output, count = tmp_path / "x.d3m", len(CLASSES) + 2
    in_turn(world, output, settings_by_name(world, name), count, backwards=True)
    assert merged(output, count) == wholes(name)


def test_shards_of_a_trained_model_take_it_from_the_one_that_trains(
    world: Path, tmp_path: Path
) -> None:
    settings = settings_of(
        method="classcond", size=(16, 16), guidance=1.5, model="tiny", search_images=12,
        images_per_class=2, candidates=2, teacher_samples=200, train_steps=6, group=4,
    )  # fmt: skip
    encode(world / "source", tmp_path / "whole.d3m", settings)
    output = tmp_path / "parts.d3m"
    in_turn(world, output, settings, 2)
    assert merged(output, 2) == (tmp_path / "whole.d3m").read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "parts.backbone" / weights).read_bytes() == (
        tmp_path / "whole.backbone" / weights
    ).read_bytes()


@pytest.mark.slow
def test_shards_of_a_budget_share_pilots(world: Path, tmp_path: Path) -> None:
    settings = quick(
        str(world / "sd"), budget=3200, candidates=None, labels=None, for_updates=40,
        images_per_class=None, code_steps=3, code_bits=4,
    )  # fmt: skip
    encode(world / "source", tmp_path / "whole.d3m", settings)
    output = tmp_path / "parts.d3m"
    in_turn(world, output, settings, 3)
    assert merged(output, 3) == (tmp_path / "whole.d3m").read_bytes()
    notes = [
        (part_of(parts_folder(output), Shard(i, 3)) / "log.txt").read_text() for i in (1, 2, 3)
    ]
    assert sum("pilot 1: " in text for text in notes) > 1


def test_shard_stops_where_it_needs_others(world: Path, tmp_path: Path) -> None:
    settings = quick(str(world / "sd"))
    with pytest.raises(WaitingError, match="shard 1 of 2 has not finished the stage 'train the"):
        encode_shard(world / "source", tmp_path / "x.d3m", Shard(2, 2), settings)
    with pytest.raises(UsageError, match="1 of 2 parts are missing: 1-of-2"):
        merge([part_of(parts_folder(tmp_path / "x.d3m"), Shard(2, 2))], tmp_path / "x.d3m")


def test_merge_names_the_shard_that_has_not_finished(world: Path, tmp_path: Path) -> None:
    settings, output = settings_by_name(world, "codes"), tmp_path / "x.d3m"
    parts = [encode_shard(world / "source", output, Shard(i, 2), settings) for i in (1, 2)]
    shutil.rmtree(Path(str(parts[1]), "codes"))
    with pytest.raises(WaitingError, match="shard 2 of 2 has not finished the stage 'code photo"):
        merge(parts, output)
    encode_shard(world / "source", output, Shard(2, 2), settings)
    assert merge(parts, output).root


def test_parts_of_other_settings_and_sources_are_refused(world: Path, tmp_path: Path) -> None:
    settings, output = settings_by_name(world, "codes"), tmp_path / "x.d3m"
    parts = [encode_shard(world / "source", output, Shard(1, 2), settings)]
    other = settings_of(
        method="codes", backbone=str(world / "sd"), code_steps=3, code_bits=4, seed=1
    )
    with pytest.raises(UsageError, match="the part 1-of-2 was made with another setting plan seed"):
        encode_shard(world / "source", output, Shard(2, 2), other)
    shutil.rmtree(parts_folder(output) / "2-of-2")
    more = make_tree(tmp_path / "more", count=21)
    with pytest.raises(UsageError, match="the part 1-of-2 was made with another"):
        encode_shard(more, output, Shard(2, 2), settings)
    shutil.rmtree(parts_folder(output) / "2-of-2")
    parts.append(encode_shard(world / "source", output, Shard(2, 2), settings))
    thirds = encode_shard(world / "source", tmp_path / "y.d3m", Shard(3, 3), settings)
    with pytest.raises(UsageError, match="parts of 2 and 3 shards do not fit"):
        merge([*parts, thirds], output)
    with pytest.raises(
        UsageError,
        match=r"the part [12]-of-2 was made with another",
    ):
        merge(parts, output, more)


def test_merge_takes_parts_alone(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no parts"):
        merge([], tmp_path / "x.d3m")
    with pytest.raises(NotFoundError, match="there is no part"):
        merge([tmp_path / "1-of-2"], tmp_path / "x.d3m")
    (tmp_path / "1-of-2").mkdir()
    with pytest.raises(JournalError, match="1-of-2 is not a work directory"):
        merge([tmp_path / "1-of-2"], tmp_path / "x.d3m")


def test_merge_opens_the_source_again_where_the_shards_found_it(home: Path, tmp_path: Path) -> None:
    source = shutil.copytree(home / "source", tmp_path / "here")
    settings, output = settings_by_name(home, "codes"), tmp_path / "x.d3m"
    parts = [encode_shard(source, output, Shard(i, 2), settings) for i in (1, 2)]
    moved = source.rename(tmp_path / "there")
    with pytest.raises(NotFoundError, match="there is no source here"):
        merge(parts, output)
    assert merge(parts, output, moved).root


def test_bad_files_that_one_shard_meets_are_listed_by_the_merge(home: Path, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    for name in ("goldfish", "school bus"):
        (source / name / "000.png").write_bytes(b"bad")
    settings, output = settings_by_name(home, "codes"), tmp_path / "x.d3m"
    parts = [encode_shard(source, output, Shard(i, 3), settings) for i in (1, 2, 3)]
    merge(parts, output)
    listed = (tmp_path / "x.d3m.work" / "skipped.txt").read_text()
    assert "goldfish\t000.png" in listed
    assert "school bus\t000.png" in listed


@pytest.mark.slow
@pytest.mark.usefixtures("long_pilot")
def test_shards_at_the_same_time_wait_for_each_other(world: Path, tmp_path: Path) -> None:
    """Two processes, and a third that is killed and run again."""
    encode(world / "source", tmp_path / "whole.d3m", quick(str(world / "sd")))
    output = tmp_path / "x.d3m"
    program = (
        "import sys; from pathlib import Path; from encode_world import quick\n"
        "from d3pack.encode import encode_shard; from d3pack.system import Shard\n"
        "import torch; torch.set_num_threads(1)\n"
        "world, output, shard = sys.argv[1:]\n"
        "encode_shard(world + '/source', output, Shard.parse(shard), quick(world + '/sd'),"
        " wait=True)\n"
    )

    def start(shard: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-c", program, str(world), str(output), shard]
        return subprocess.Popen(words, env=environ)

    first, second, killed = start("1/3"), start("2/3"), start("3/3")
    killed.kill()
    killed.wait()
    third = start("3/3")
    assert [process.wait(120) for process in (first, second, third)] == [0, 0, 0]
    assert merged(output, 3) == (tmp_path / "whole.d3m").read_bytes()


def test_command_encodes_in_shards_and_merges(home: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "x.d3m", tmp_path / "whole.d3m"
    words = ["encode", str(home / "source"), "--method", "codes", "--backbone", str(home / "sd")]
    assert invoke(*words, "-o", str(whole)).exit_code == 0
    for shard in ("1/2", "2/2"):
        result = invoke(*words, "-o", str(output), "--shard", shard)
        assert result.exit_code == 0, result.stderr
        assert f"shard {shard} has finished" in result.stdout
    parts = [str(parts_folder(output) / f"{i}-of-2") for i in (1, 2)]
    assert "are missing: 2-of-2" in invoke("merge", parts[0], "-o", str(output)).stderr
    result = invoke("merge", *parts, "-o", str(output), "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert check_output("merge (an event a line)", result.stdout)[-1]["event"] == "done"
    assert output.read_bytes() == whole.read_bytes()


def test_command_codes_in_shards_and_merges(home: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "x.d3m", tmp_path / "whole.d3m"
    words = ["code", str(home / "source"), "--backbone", str(home / "sd"), "--bytes-per-image", "3"]
    assert invoke(*words, "-o", str(whole)).exit_code == 0
    for shard in ("2/2", "1/2"):
        result = invoke(*words, "-o", str(output), "--shard", shard)
        assert result.exit_code == 0, result.stderr
    parts = [str(parts_folder(output) / f"{i}-of-2") for i in (1, 2)]
    assert invoke("merge", *parts, "-o", str(output)).exit_code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_command_says_what_a_shard_waits_for(home: Path, tmp_path: Path) -> None:
    words = ["encode", str(home / "source"), "--backbone", str(home / "sd"), *SHORT]
    result = invoke(*words, "-o", str(tmp_path / "x.d3m"), "--shard", "2/2")
    assert result.exit_code == 8
    assert "shard 1 of 2 has not finished the stage 'train the teacher'" in result.stderr
    assert "--wait is for --shard" in invoke(*words, "-o", "x.d3m", "--wait").stderr
    assert "expected NUMBER/COUNT" in invoke(*words, "-o", "x.d3m", "--shard", "3").stderr
    both = invoke(*words, "-o", "x.d3m", "--shard", "1/2", "--devices", "2")
    assert both.exit_code == 2
    assert "--shard is for runs without workers" in both.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["d3m", "minimax"])
def test_finished_run_that_lost_its_pack_makes_it_again(
    world: Path, tmp_path: Path, name: str
) -> None:
    settings, output = settings_by_name(world, name), tmp_path / "x.d3m"
    encode(world / "source", output, settings)
    before = output.read_bytes()
    output.unlink()
    encode(world / "source", output, settings)
    assert output.read_bytes() == before
