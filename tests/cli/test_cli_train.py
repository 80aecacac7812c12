"""`d3pack train` as it is typed: what it tells, what it refuses, and that it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli import invoke
from cli_schema import check_output
from encode_world import make_tree

from d3pack.backbones import open_backbone
from d3pack.errors import D3MError, UsageError
from d3pack.system import parse_duration

pytestmark = pytest.mark.heavy


def call(*args: Any) -> Any:
    return invoke("train", *args)


def test_photos_become_a_backbone_and_a_second_call_adds_nothing(tmp_path: Path) -> None:
    photos = make_tree(tmp_path / "photos", 12)
    out = tmp_path / "bb"
    command = (photos, "-o", out, "--preset", "tiny", "--device", "cpu", "--licence", "cc0-1.0")
    done = call(*command, "--format", "json")
    assert done.exit_code == 0, done.exception
    events = check_output("train (an event a line)", done.stdout)
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == ["photos", "autoencoder", "text", "latents", "diffusion"]
    assert all(event["step"] >= 0 for event in events)
    backbone = open_backbone(str(out))
    assert backbone.ref.kind == "stable-diffusion"
    weights = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert "cc0-1.0" in "".join(p.read_text() for p in out.glob("*.json"))

    again = call(*command)
    assert again.exit_code == 0, again.exception
    assert f"use it as --backbone {out}" in again.stdout
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_people_are_told_rates_losses_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from d3pack.cli.train import _tell

    _tell(
        {
            "event": "progress", "stage": "diffusion", "step": 1200, "samples_per_s": 81.25,
            "loss": 0.12345, "seconds": 10.0, "progress": 0.5, "left": 300.0,
        }
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("diffusion", "1,200", "81.2/s", "loss 0.1235", "5 min left"):
        assert part in err
    assert "seconds" not in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--preset", "huge"), "E_USAGE", "invalid --preset 'huge'"),
        (("--time-budget", "soon"), "E_USAGE", "invalid duration 'soon'"),
        (("--time-budget", "0m"), "E_USAGE", "invalid duration '0m'"),
        (("--device", "cuda:63"), "E_USAGE", "there is no cuda:63 on this machine"),
        (("--init-from", "nowhere"), "E_USAGE", "nowhere holds no backbone"),
        (("--stage", "colours", "--preset", "tiny"), "E_USAGE", "colours"),
    ],
)
def test_wrong_settings_are_refused_before_training(
    tmp_path: Path, args: tuple[str, ...], code: str, words: str
) -> None:
    photos = make_tree(tmp_path / "photos", 2)
    found = call(photos, "-o", tmp_path / "bb", *args).exception
    assert isinstance(found, D3MError), found
    assert (found.code, found.exit_code) == (code, 2)
    assert words in str(found)
    assert not (tmp_path / "bb" / "unet").exists()


def test_durations_have_a_number_and_a_unit() -> None:
    assert [parse_duration(text) for text in ("600s", "90m", "1.5h")] == [600.0, 5400.0, 5400.0]
    for text in ("", "m", "-3m", "1d", "1e9s", "5"):
        with pytest.raises(UsageError, match="invalid duration"):
            parse_duration(text)
