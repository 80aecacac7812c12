"""Small packs on a tiny backbone, for the tests of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from d3pack.backbones import open_backbone
from d3pack.decode import samplers
from d3pack.format import Pack
from d3pack.format.codecs import encode_labels, encode_prompts
from d3pack.format.recipe import Recipe

if TYPE_CHECKING:
    from d3pack.dataset import D3MDataset

NAMES = ("goldfish", "penguin", "tabby cat", "school bus", "castle", "lemon", "frog")


def tiny_pack(
    backbone: Path,
    *,
    classes: int = 3,
    images: int = 7,
    steps: int = 1,
    group: int = 4,
    seed: int = 11,
    labels: bool = False,
) -> Pack:
    """Random prompts, DDIM, on the tiny backbone in a directory."""
    opened = open_backbone(str(backbone))
    random = np.random.default_rng(seed)
    prompts = random.normal(size=(classes, 1, 1, opened.prompt_shape[1])).astype(np.float32)
    probabilities = random.dirichlet(np.ones(classes), size=(classes, images))
    return Pack(
        classes=NAMES[:classes],
        images_per_class=images,
        recipe=Recipe(
            backbone=opened.ref,
            size=opened.image_size,
            sampler="ddim",
            sigmas=samplers.schedule(opened.levels.alphas_cumprod, "ddim", steps),
            group=group,
        ),
        prompts=encode_prompts(prompts),
        seed=seed,
        labels=encode_labels(probabilities, "dense") if labels else None,
    )


def spied(dataset: D3MDataset) -> list[list[int]]:
    """What the dataset asks of its decoder from now on, request by request."""
    asked: list[list[int]] = []
    decoder = dataset.images._decoder = dataset.images._open_decoder()
    images = decoder.images

    def spy(numbers: Sequence[int], epoch: int = 0) -> torch.Tensor:
        asked.append([int(number) for number in numbers])
        return images(numbers, epoch)

    decoder.images = spy  # type: ignore[method-assign,assignment]
    return asked


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    with open(path, "r+b") as file:
        file.write(data)
