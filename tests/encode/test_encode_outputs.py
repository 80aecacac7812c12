"""Encoding to outputs of the text encoder: the pack is decoded without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import fails, make_tree, quick
from tiny_backbones import tiny_dit, tiny_sd, tiny_sdxl, without_text

from d3pack.backbones import lock_directory, open_backbone, write_list
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import encode, estimate_encode
from d3pack.errors import UsageError
from d3pack.format import decode_prompts, read
from d3pack.testing import raises_code

TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    make_tree(root / "source", 8)
    tiny_sd(root / "sd")
    return root


def outputs(world: Path, **more: Any) -> Any:
    return quick(world / "sd", condition="outputs", **{"vectors": 3, "guidance": 2.0, **more})


@pytest.mark.heavy
def test_outputs_are_learned_and_decoded_alone(world: Path, tmp_path: Path) -> None:
    settings = outputs(world, probes=2)
    pack = encode(world / "source", tmp_path / "a.d3m", settings, teachers=world / "teachers")
    assert pack.recipe.template is None
    assert list(pack.prompts.params["shape"]) == [2, 3, 32]
    assert pack.unconditional is not None
    bare = without_text(world / "sd", tmp_path / "bare")
    write_list(bare, lock_directory(world / "sd"))
    found = read(tmp_path / "a.d3m")
    decoder = Decoder(found, path=bare)
    assert verify_probes(found, decoder).verdict == "exact"
    options = found.provenance["options"]
    assert options["condition"] == "outputs"
    expected = estimate_encode(world / "source", settings)["bytes"]
    assert abs(expected - (tmp_path / "a.d3m").stat().st_size) < 120


@pytest.mark.heavy
def test_outputs_start_at_those_of_the_class_name(world: Path, tmp_path: Path) -> None:
    """Without a step, the pack holds what the encoder makes of the template."""
    settings = outputs(world, steps=0, cool=0, modes=1, codec="f16", template="an image of {}")
    pack = encode(world / "source", tmp_path / "b.d3m", settings, teachers=world / "teachers")
    backbone = open_backbone(str(world / "sd"))
    with torch.no_grad():
        wanted = [backbone.outputs(f"an image of {name}", 3).numpy() for name in pack.classes]
        none = backbone.outputs("", 3).numpy()
    np.testing.assert_allclose(decode_prompts(pack.prompts)[:, 0], wanted, rtol=1e-3, atol=1e-3)
    assert pack.unconditional is not None
    stored = decode_prompts(pack.unconditional)[0, 0]
    np.testing.assert_allclose(stored, none, atol=float(np.abs(none).max()) / 127)
    plain = outputs(world, steps=0, cool=0, modes=1, guidance=1.0)
    unguided = encode(world / "source", tmp_path / "c.d3m", plain, teachers=world / "teachers")
    assert unguided.unconditional is None


@pytest.mark.heavy
def test_learned_outputs_have_a_lower_loss(world: Path, tmp_path: Path) -> None:
    settings = outputs(world, steps=20, provenance="full")
    pack = encode(world / "source", tmp_path / "d.d3m", settings, teachers=world / "teachers")
    metrics = pack.provenance["metrics"]
    assert metrics["loss"] < metrics["start_loss"]


@pytest.mark.heavy
@pytest.mark.parametrize("condition", ["tokens", "outputs"])
def test_sdxl_encodes_to_a_pack(condition: str, world: Path, tmp_path: Path) -> None:
    root = tiny_sdxl(tmp_path / "xl", scheduler=TURBO)
    settings = quick(root, condition=condition, sampler_steps=None, probes=2, labels="none")
    pack = encode(world / "source", tmp_path / "x.d3m", settings, teachers=world / "teachers")
    recipe, found = pack.recipe, read(tmp_path / "x.d3m")
    assert (recipe.sampler, len(recipe.sigmas), recipe.guidance) == ("ancestral", 5, 1.0)
    assert recipe.extra == {"eta": 1.0}
    assert list(pack.prompts.params["shape"]) == [2, 1 if condition == "tokens" else 2, 64]
    assert pack.unconditional is None
    assert verify_probes(found, Decoder(found, path=root)).verdict == "exact"
    if condition == "outputs":
        bare = without_text(root, tmp_path / "bare")
        assert verify_probes(found, Decoder(found, path=bare)).verdict == "exact"
    expected = estimate_encode(world / "source", settings)["bytes"]
    assert abs(expected - (tmp_path / "x.d3m").stat().st_size) < 120


def test_pooled_vectors_are_not_stored_as_pq(world: Path, tmp_path: Path) -> None:
    """A codebook would fill them up with other values than zeros."""
    settings = quick(tiny_sdxl(tmp_path / "xl"), condition="outputs", codec="pq")
    with pytest.raises(UsageError, match="invalid codec 'pq'"):
        estimate_encode(world / "source", settings)


def test_what_a_backbone_does_not_take_is_refused(world: Path, tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path / "dit")
    with pytest.raises(UsageError, match="this backbone takes no outputs"):
        estimate_encode(world / "source", quick(dit, condition="outputs", vectors=1, modes=1))
    with pytest.raises(UsageError, match="at most 16 vectors"):
        estimate_encode(world / "source", outputs(world, vectors=17))


def test_missing_encoder_is_named_in_one_line(world: Path, tmp_path: Path) -> None:
    bare = without_text(world / "sd", tmp_path / "bare")
    write_list(bare, lock_directory(world / "sd"))
    args = (world / "source", "-o", tmp_path / "x.d3m", "--backbone", bare)
    error = fails(*args, "--condition", "outputs")
    assert error.code == "E_BACKBONE_MISSING"
    assert "text_encoder" in str(error)
    with raises_code("E_BACKBONE_MISSING", match="text_encoder/config.json"):
        open_backbone(lock_directory(world / "sd"), path=bare)
