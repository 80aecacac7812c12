"""`d3pack verify --decode`: whether a pack is valid, and whether it decodes, are two results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli import invoke
from dataset_packs import tiny_pack
from places import ROOT
from tiny_backbones import tiny_sd

import d3pack
from d3pack.cli._command import all_verbs, flags_of
from d3pack.decode import Decoder, limits, make_probes, probes, verify_probes

SCHEMA = json.loads((ROOT / "spec" / "cli.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a pack with probes, and one without."""
    room = tmp_path_factory.mktemp("verify")
    tiny_sd(room / "sd")
    pack = tiny_pack(room / "sd", classes=2, images=2)
    d3pack.write(pack, room / "plain.d3m")
    probes = make_probes(Decoder(pack, path=room / "sd"), [(0, 0), (1, 1)], (16, 16))
    d3pack.write(replace(pack, probes=probes), room / "probed.d3m")
    (room / "bad.d3m").write_bytes(b"\0" * 80)
    return room


@pytest.mark.parametrize(
    ("pack", "backbone", "code", "error"),
    [
        ("probed.d3m", "sd", 0, None),
        ("probed.d3m", "nowhere", 5, "E_NOT_FOUND"),
        ("probed.d3m", "empty", 4, "E_BACKBONE_MISSING"),
        ("plain.d3m", "sd", 2, "E_USAGE"),
    ],
)
def test_pack_stays_valid_where_it_cannot_be_decoded(
    world: Path, pack: str, backbone: str, code: int, error: str | None
) -> None:
    (world / "empty").mkdir(exist_ok=True)
    words = ["verify", world / pack, "--decode", "--backbone", world / backbone]
    result = invoke(*words, "--format", "json")
    (found,) = json.loads(result.stdout)
    jsonschema.Draft202012Validator({**SCHEMA, **SCHEMA["$defs"]["verify"]}).validate([found])
    assert result.exit_code == code
    assert found["valid"] is True
    assert found["root"] == d3pack.read(world / pack).root
    assert found["decode"].get("code") == error
    shown = invoke(*words)
    assert shown.exit_code == code
    assert shown.stdout.startswith("valid    ")
    assert ("not decoded" in shown.stderr) == (error is not None)
    if error:
        assert f"[{error}]" in shown.stderr


def vast(world: Path, name: str, **changes: Any) -> Path:
    """The pack with probes, with a recipe that asks for more."""
    pack = d3pack.read(world / "probed.d3m")
    d3pack.write(replace(pack, recipe=replace(pack.recipe, **changes)), world / name)
    return world / name


def test_groups_that_take_all_memory_are_refused_before_the_backbone_is_opened(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = vast(world, "big.d3m", group=1024, size=(2048, 2048))
    monkeypatch.setattr("d3pack.decode.Decoder", None)
    result = invoke("verify", pack, "--decode", "--backbone", world / "sd")
    assert result.exit_code == 2
    assert "[E_LONG]" in result.stderr
    assert "4,294,967,296 pixels" in result.stderr
    assert "--yes" in result.stderr


def test_hours_are_refused_and_done_where_they_are_allowed(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["verify", world / "probed.d3m", "--decode", "--backbone", world / "sd"]
    monkeypatch.setattr(limits, "LONG", 1e-6)
    refused = invoke(*words)
    assert refused.exit_code == 2
    assert "[E_LONG] the probes take about 1 s on this machine" in refused.stderr
    assert invoke(*words, "--yes").exit_code == 0


def test_long_work_says_how_long_it_takes_and_how_far_it_is(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["verify", world / "probed.d3m", "--decode", "--backbone", world / "sd"]
    quick = invoke(*words)
    assert "on this machine" not in quick.stderr
    monkeypatch.setattr("d3pack.cli.verify._SHOWN", 0.0)
    monkeypatch.setattr("d3pack.system.progress.LOG_SECONDS", 0.0)
    told = invoke(*words)
    assert "about 1 s on this machine" in told.stderr
    shown = []
    pack = d3pack.read(world / "probed.d3m")
    with Decoder(pack, path=world / "sd") as decoder:
        steps = sum(n for _, n in decoder.plan([(0, 0), (1, 1)]))
        verify_probes(pack, decoder, lambda done, total: shown.append((done, total)))
    assert shown == [(done, steps) for done in range(1, steps + 1)]
    assert told.stdout == quick.stdout


@pytest.mark.parametrize(("side", "group"), [(64, 16), (512, 16), (1024, 16), (1024, 4)])
def test_groups_of_ordinary_packs_are_not_refused(world: Path, side: int, group: int) -> None:
    pack = d3pack.read(world / "probed.d3m")
    recipe = replace(pack.recipe, size=(side, side), group=group)
    probes.check_probe_memory(replace(pack, recipe=recipe))


def test_invalid_pack_outweighs_one_that_does_not_decode(world: Path) -> None:
    words = ["verify", "--decode", "--backbone", world / "nowhere"]
    assert invoke(*words, world / "probed.d3m", world / "bad.d3m").exit_code == 3
    assert invoke(*words, world / "bad.d3m", world / "probed.d3m").exit_code == 3


def test_every_verb_has_the_same_default_device(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA where there is one: no verb names a device of its own."""
    defaults = {
        name: flag.option.default
        for name, verb in all_verbs().items()
        for flag in flags_of(verb)
        if flag.label == "--device"
    }
    assert {"code", "decode", "encode", "eval", "preview", "push", "train", "verify"} == set(
        defaults
    )
    assert set(defaults.values()) == {None}
    asked: list[str | None] = []

    def decoder(pack: d3pack.Pack, *, device: str | None, path: str) -> Decoder:
        asked.append(device)
        return Decoder(pack, device=device, path=path)

    monkeypatch.setattr("d3pack.decode.Decoder", decoder)
    words = ["verify", world / "probed.d3m", "--decode", "--backbone", world / "sd"]
    assert invoke(*words).exit_code == 0
    assert asked == [None]
