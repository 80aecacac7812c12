"""Flow-matching transformers: photographs become a pack and codes, which decode without text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import make_tree, quick, settings_of
from tiny_backbones import tiny_pack, without_text
from tiny_flow import KINDS, tiny_flow

from d3pack.backbones import default_sampling, lock_directory, open_backbone, write_list
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import encode
from d3pack.encode.codes import Coder
from d3pack.errors import BackboneError
from d3pack.format import Codes, Coding, encode_codes, read

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flow")
    make_tree(root / "source", 8)
    for kind in KINDS:
        tiny_flow(kind, root / kind)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_learned_and_decoded_alone(kind: str, world: Path, tmp_path: Path) -> None:
    """With the sampler, steps and guidance that the family was made for."""
    own = {"sampler": None, "sampler_steps": None, "guidance": None, "size": (64, 64)}
    settings = quick(world / kind, vectors=2, probes=2, steps=20, provenance="full", **own)
    pack = encode(world / "source", tmp_path / "a.d3m", settings, teachers=world / "teachers")
    sampling = default_sampling(open_backbone(str(world / kind)))
    assert pack.recipe.template is None
    assert (pack.recipe.sampler, pack.recipe.guidance) == (sampling.sampler, sampling.guidance)
    assert len(pack.recipe.sigmas) == sampling.steps + 1
    assert pack.recipe.sigmas[0] == 1e6
    assert (pack.unconditional is not None) == (sampling.guidance != 1.0)
    metrics = pack.provenance["metrics"]
    assert metrics["loss"] < metrics["start_loss"]
    bare = without_text(world / kind, tmp_path / "bare")
    write_list(bare, lock_directory(world / kind))
    found = read(tmp_path / "a.d3m")
    assert verify_probes(found, Decoder(found, path=bare)).verdict == "exact"


def test_encode_needs_the_text_encoder(world: Path, tmp_path: Path) -> None:
    bare = without_text(world / "prx", tmp_path / "bare")
    with pytest.raises(BackboneError, match=r"text_encoder/config.json is missing") as caught:
        encode(world / "source", tmp_path / "a.d3m", quick(bare), teachers=world / "teachers")
    assert "\n" not in str(caught.value)
    assert caught.value.code == "E_BACKBONE_MISSING"


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_become_codes(kind: str, world: Path, tmp_path: Path) -> None:
    settings = settings_of(
        method="codes",
        backbone=str(world / kind),
        size=(64, 64),
        code_steps=4,
        group=3,
        device="cpu",
    )
    pack = encode(world / "source", tmp_path / "a.d3m", settings)
    bare = without_text(world / kind, tmp_path / "bare")
    write_list(bare, lock_directory(world / kind))
    found = read(tmp_path / "a.d3m")
    assert found.coded_images == 8
    whole = Decoder(found, path=bare).images(range(len(pack)))
    assert torch.equal(Decoder(found, path=world / kind).images([5, 0])[0], whole[5])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_as_near_as_their_bits_allow(kind: str, world: Path) -> None:
    """Of a velocity that pulls nowhere, codes are matching pursuit: more atoms come nearer."""
    backbone: Any = open_backbone(str(world / kind))
    named = backbone.named_tensors()
    last = [n for n in named if n.split(".")[0] in _LAST]
    assert last
    with torch.no_grad():
        for name in last:
            named[name].zero_()
    pack = tiny_pack(world / kind, backbone=backbone, template=None, vectors=2, size=(64, 64))
    shape = backbone.latent_shape_for((64, 64))
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    gaps = []
    for atoms in (1, 4, 16):
        coding = Coding(sigmas=(7.0, 2.0, 0.5, 0.0), atoms=(atoms,) * 3, bits=8)
        chosen, signs = Coder(backbone, coding, pack, 0).code(latents)
        codes = encode_codes(
            Codes(coding, 2, np.stack([chosen] * 3).astype(np.int64), np.stack([signs] * 3))
        )
        coded = replace(pack, codes=codes)
        decoder = Decoder(coded, backbone=backbone)
        with torch.inference_mode():
            pairs = [(0, 0), (0, 1)]
            made = decoder._latents(pairs, decoder._model(pairs), 0)
        gaps.append(float((made - latents).square().mean()))
    assert gaps[0] > gaps[1] > gaps[2]


_LAST = ("final_layer", "all_final_layer", "proj_out")
