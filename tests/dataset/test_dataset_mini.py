"""On the embedded backbone no byte differs, however an image is asked for."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import d3pack
from d3pack.backbones import open_backbone
from d3pack.dataset import D3MDataset
from d3pack.decode import samplers
from d3pack.errors import BackboneError
from d3pack.format import Pack
from d3pack.format.codecs import encode_prompts
from d3pack.format.recipe import Recipe

pytestmark = pytest.mark.heavy

NAMES = ("goldfish", "school bus", "lemon")
IMAGES = 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 guided images of classes by their names."""
    try:
        mini = open_backbone("mini")
    except BackboneError as error:
        if error.code != "E_BACKBONE_MISSING":
            raise
        pytest.skip("the embedded backbone is not in this checkout")
    prompts = torch.stack([mini.name_vectors(name, 2) for name in NAMES])[:, None]
    pack = Pack(
        classes=NAMES,
        images_per_class=IMAGES,
        recipe=Recipe(
            backbone=mini.ref,
            size=mini.image_size,
            sampler="dpmpp-2m",
            sigmas=samplers.schedule(mini.levels.alphas_cumprod, "dpmpp-2m", 4),
            guidance=2.0,
            group=4,
        ),
        prompts=encode_prompts(prompts.detach().float().numpy()),
        seed=2026,
    )
    path = tmp_path_factory.mktemp("mini") / "mini.d3m"
    d3pack.write(pack, path)
    return path


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def in_order(batches: Any, reference: torch.Tensor) -> torch.Tensor:
    """Rows in the order of the images that they equal; a row that equals none is an error."""
    out = torch.zeros_like(reference)
    for images, labels in batches:
        for image, label in zip(images, labels.tolist(), strict=True):
            index = int((reference == image).flatten(1).all(1).nonzero())
            assert label == index // IMAGES
            out[index] = image
    return out


@pytest.fixture(scope="module")
def reference(file: Path) -> torch.Tensor:
    """Every image, asked for alone."""
    dataset = D3MDataset(file, device="cpu", quiet=True, cache=None)
    images = torch.stack([dataset[index][0] for index in range(len(dataset))])
    assert len({digest(image) for image in images}) == len(dataset)
    return images


def test_images_are_equal_however_they_are_asked_for(
    file: Path, reference: torch.Tensor, tmp_path: Path
) -> None:
    dataset = D3MDataset(file, device="cpu", quiet=True, cache=None)
    want = digest(reference)
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    asked = dataset.__getitems__(order)
    for (image, _), index in zip(asked, order, strict=True):
        assert torch.equal(image, reference[index])
    disk = D3MDataset(file, device="cpu", quiet=True, cache_dir=tmp_path)
    ranks = [disk.loader(3, shuffle=True, seed=5, rank=rank, world=2) for rank in range(2)]
    for _ in range(2):  # the first epoch decodes, the second reads
        rows = [batch for loader in ranks for batch in loader]
        assert digest(in_order(rows, reference)) == want
    forked = DataLoader(
        D3MDataset(file, device="cpu", quiet=True, cache=None),
        batch_size=4,
        shuffle=True,
        num_workers=1,
        multiprocessing_context="fork",
    )
    assert digest(in_order(forked, reference)) == want


def test_images_are_equal_in_processes_with_other_threads(
    file: Path, reference: torch.Tensor
) -> None:
    script = """
import sys, hashlib, torch
from d3pack import D3MDataset
torch.set_num_threads(int(sys.argv[2]))
dataset = D3MDataset(sys.argv[1], device="cpu", quiet=True, cache=None)
rows = dataset.__getitems__(list(range(len(dataset)))[::-1])
images = torch.stack([image for image, _ in rows[::-1]])
print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(file), threads],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for threads in ("1", "2")
    }
    assert digests == {digest(reference)}
