"""Codes at the shapes of Stable Diffusion: 512 px, latents of 4x64x64, codebooks of 16,384 entries.

Such a codebook has 268 million values, 1 GB as float32. Minutes for each test.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import make_tree
from full_backbones import full_sd
from tiny_backbones import tiny_sd

import d3pack
from d3pack import Pack
from d3pack.backbones import open_backbone
from d3pack.decode import Decoder, verify_probes
from d3pack.encode.codes import Coder
from d3pack.encode.methods.codes.method import images_of
from d3pack.format import decode_codes
from d3pack.sources import open_source

pytestmark = pytest.mark.slow

LEVELS, BITS, IMAGES = 3, 14, 2


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for gigabytes, which pytest would keep for three runs."""
    yield tmp_path / "full"
    shutil.rmtree(tmp_path / "full", ignore_errors=True)


@pytest.mark.parametrize(("atoms", "width"), [(45, 489), (300, 2455)])
def test_large_codes_have_their_bytes_and_images(atoms: int, width: int, tmp_path: Path) -> None:
    path = tiny_sd(tmp_path / "sd", side=64)
    make_tree(tmp_path / "source", IMAGES, ("lemon", "goldfish"))
    pack = encoded(path, tmp_path / "source", atoms, group=3)
    check_bytes(pack, IMAGES, atoms, width)

    decoder = check_images(pack, path, tmp_path / "source")
    images = decoder.images(range(4))
    assert torch.equal(decoder.images([3, 1, 0, 2]), images[[3, 1, 0, 2]])
    assert torch.equal(decoder.images([2])[0], images[2])


def test_stable_diffusion_of_full_size_codes_300_atoms(place: Path, tmp_path: Path) -> None:
    """In three passes, 100 atoms each: 860 million random weights take seconds for a pass."""
    make_tree(tmp_path / "source", 1, ("lemon", "goldfish"))
    pack = encoded(full_sd(place), tmp_path / "source", 100, group=1)
    check_bytes(pack, 1, 100, 975)
    check_images(pack, place, tmp_path / "source")


def encoded(backbone: Path, source: Path, atoms: int, *, group: int) -> Pack:
    """Encode a source through the command; the pack must be of 512 px."""
    out = source.with_name("x.d3m")
    found = invoke(
        "encode", source, "-o", out, "--method", "codes", "--backbone", backbone,
        "--code-steps", str(LEVELS), "--code-bits", str(BITS), "--code-atoms", str(atoms),
        "--group", str(group), "--format", "quiet",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    pack = d3pack.read(out)
    assert pack.recipe.size == (512, 512)
    return pack


def check_bytes(pack: Pack, images: int, atoms: int, width: int) -> None:
    """A code has `width` bits for each level, as computed, and nothing else."""
    assert width == math.ceil(math.log2(math.comb(2**BITS, atoms))) + atoms
    assert pack.codes is not None
    assert pack.codes.nbytes == len(pack.classes) * math.ceil(images * LEVELS * width / 8)


def check_images(pack: Pack, path: Path, source: Path) -> Decoder:
    """The codes are those of the photographs, and the pack's own probe is decoded exactly."""
    backbone = open_backbone(str(path), device="cpu")
    assert backbone.latent_shape == (4, 64, 64)
    assert pack.codes is not None
    codes = decode_codes(pack.codes)
    photos = images_of(open_source(source), 0, pack.recipe.size, codes.images)
    with torch.no_grad():
        latents = backbone.encode(photos).float()
    chosen, signs = Coder(backbone, codes.coding, pack, 0).code(latents)
    assert np.array_equal(chosen, codes.atoms[0])
    assert np.array_equal(signs, codes.signs[0])
    decoder = Decoder(pack, backbone=backbone)
    assert verify_probes(pack, decoder).verdict == "exact"
    return decoder
