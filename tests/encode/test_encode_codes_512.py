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
from d3pack.decode import Decoder, verify_probes
from d3pack.format import decode_codes

pytestmark = pytest.mark.slow

LEVELS, BITS, IMAGES = 3, 14, 3
SMALL, LARGE = (45, 489), (300, 2455)  # atoms, and bits of a level


def made(folder: Path, name: str, atoms: int) -> Path:
    found = invoke(
        "encode", folder / "source", "-o", folder / name, "--method", "codes",
        "--backbone", folder / "sd", "--code-steps", str(LEVELS), "--code-bits", str(BITS),
        "--code-atoms", str(atoms), "--group", "2", "--format", "quiet",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    return folder / name


@pytest.mark.parametrize(("atoms", "width"), [SMALL, LARGE])
def test_large_codes_have_their_bytes_and_images(atoms: int, width: int, tmp_path: Path) -> None:
    tiny_sd(tmp_path / "sd", side=64)
    make_tree(tmp_path / "source", IMAGES, ("lemon",))
    path = made(tmp_path, "x.d3m", atoms)
    pack = d3pack.read(path)
    assert (pack.recipe.size, pack.coded_images) == ((512, 512), IMAGES)
    assert width == math.ceil(math.log2(math.comb(2**BITS, atoms))) + atoms
    assert pack.codes is not None
    assert pack.codes.nbytes == math.ceil(IMAGES * LEVELS * width / 8)
    chosen = decode_codes(pack.codes).atoms.reshape(IMAGES * LEVELS, atoms)
    assert len(np.unique(chosen, axis=0)) == IMAGES * LEVELS
    assert path.read_bytes() == made(tmp_path, "again.d3m", atoms).read_bytes()
    decoder = Decoder(pack, path=tmp_path / "sd")
    assert decoder.latent_shape == (4, 64, 64)
    assert verify_probes(pack, decoder).verdict == "exact"
    images = decoder.images(range(IMAGES))
    assert torch.equal(decoder.images([2, 0, 1]), images[[2, 0, 1]])
    assert torch.equal(decoder.images([1])[0], images[1])
