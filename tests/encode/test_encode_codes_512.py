"""Codes at the shapes of Stable Diffusion: 512 px, latents of 4x64x64, codebooks of 16,384 entries.

Such a codebook has 268 million values, 1 GB as float32. Minutes for each test.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import make_tree
from tiny_backbones import tiny_sd

import d3pack
from d3pack.backbones import open_backbone
from d3pack.decode import Decoder, verify_probes
from d3pack.encode.codes import Coder
from d3pack.encode.methods.codes.method import images_of
from d3pack.format import decode_codes
from d3pack.sources import open_source

pytestmark = pytest.mark.slow

LEVELS, BITS, IMAGES = 3, 14, 2


@pytest.mark.parametrize(("atoms", "width"), [(45, 489), (300, 2455)])
def test_large_codes_have_their_bytes_and_images(atoms: int, width: int, tmp_path: Path) -> None:
    backbone = open_backbone(str(tiny_sd(tmp_path / "sd", side=64)), device="cpu")
    make_tree(tmp_path / "source", IMAGES, ("lemon", "goldfish"))
    found = invoke(
        "encode", tmp_path / "source", "-o", tmp_path / "x.d3m", "--method", "codes",
        "--backbone", tmp_path / "sd", "--code-steps", str(LEVELS), "--code-bits", str(BITS),
        "--code-atoms", str(atoms), "--group", "3", "--format", "quiet",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    pack = d3pack.read(tmp_path / "x.d3m")
    assert (pack.recipe.size, backbone.latent_shape) == ((512, 512), (4, 64, 64))
    assert width == math.ceil(math.log2(math.comb(2**BITS, atoms))) + atoms
    assert pack.codes is not None
    assert pack.codes.nbytes == 2 * math.ceil(IMAGES * LEVELS * width / 8)

    codes = decode_codes(pack.codes)
    photos = images_of(open_source(tmp_path / "source"), 0, pack.recipe.size, IMAGES)
    with torch.no_grad():
        latents = backbone.encode(photos).float()
    chosen, signs = Coder(backbone, codes.coding, pack, 0).code(latents)
    assert np.array_equal(chosen, codes.atoms[0])
    assert np.array_equal(signs, codes.signs[0])

    decoder = Decoder(pack, backbone=backbone)
    assert verify_probes(pack, decoder).verdict == "exact"
    images = decoder.images(range(4))
    assert torch.equal(decoder.images([3, 1, 0, 2]), images[[3, 1, 0, 2]])
    assert torch.equal(decoder.images([2])[0], images[2])
