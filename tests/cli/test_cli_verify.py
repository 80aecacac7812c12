"""`d3pack verify --decode`: whether a pack is valid, and whether it decodes, are two results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from cli import invoke
from dataset_packs import tiny_pack
from places import ROOT
from tiny_backbones import tiny_sd

import d3pack
from d3pack.cli._command import all_verbs, flags_of
from d3pack.decode import Decoder, make_probes

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
