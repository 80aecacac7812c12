"""Photographs without colours make packs of images without colours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import CLASSES, make_tree, picture, quick
from PIL import Image

from d3pack.decode import Decoder, verify_probes
from d3pack.encode import encode
from d3pack.encode.plan import is_grey
from d3pack.format import read
from d3pack.sources import Source, open_source


def tree(root: Path, convert: Any) -> Source:
    """Images of each class through `convert`, four of each."""
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(4):
            convert(picture(c, i)).save(root / name / f"{i}.png")
    return open_source(root)


def tinted(by: int) -> Any:
    def convert(image: Image.Image) -> Image.Image:
        grey = np.asarray(image.convert("L")).clip(0, 255 - by)
        return Image.fromarray(np.stack([grey, grey + by, grey], 2).astype(np.uint8))

    return convert


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (lambda image: image, False),
        (lambda image: image.convert("L"), True),
        (lambda image: image.convert("L").convert("RGB"), True),
        (lambda image: image.convert("1"), True),
        (tinted(3), True),  # JPEG rounds
        (tinted(4), False),
    ],
)
def test_a_source_is_grey_where_channels_are_equal(
    tmp_path: Path, convert: Any, expected: bool
) -> None:
    assert is_grey(tree(tmp_path, convert)) is expected


def test_one_coloured_image_makes_a_source_coloured(tmp_path: Path) -> None:
    source = tree(tmp_path, lambda image: image.convert("L"))
    picture(2, 3).save(tmp_path / CLASSES[2] / "3.png")
    assert not is_grey(source)
    (tmp_path / CLASSES[2] / "3.png").write_bytes(b"no image")
    assert is_grey(open_source(tmp_path))


@pytest.mark.heavy
def test_images_of_a_grey_source_are_grey(tmp_path: Path) -> None:
    source = tree(tmp_path / "grey", lambda image: image.convert("L"))
    settings = quick(
        "mini",
        images_per_class=2,
        candidates=1,
        codes=1,
        code_steps=3,
        sampler_steps=2,
        modes=1,
        steps=0,
        cool=0,
    )
    pack = encode(source, tmp_path / "grey.d3m", settings)
    assert pack.recipe.grey
    images = Decoder(pack).images([(c, i) for c in range(3) for i in range(2)])
    assert torch.equal(images[:, :1].expand_as(images), images)
    assert len(images.unique()) > 20
    assert verify_probes(read(tmp_path / "grey.d3m"), Decoder(pack)).verdict == "exact"
    assert ", grey" in invoke("info", str(tmp_path / "grey.d3m")).stdout
    coloured = encode(source, tmp_path / "kept.d3m", replace(settings, colours=True))
    assert not coloured.recipe.grey
    made = Decoder(coloured).images([(c, i) for c in range(3) for i in range(2)])
    assert any(not torch.equal(image[0], image[1]) for image in made)


def test_the_plan_says_that_images_will_be_grey(tmp_path: Path) -> None:
    tree(tmp_path / "grey", lambda image: image.convert("L"))
    make_tree(tmp_path / "coloured", 4)
    words = ("--dry-run", "--backbone", "mini", "--ipc", "2", "--candidates", "1")
    said = {
        name: "grey images" in invoke("encode", str(tmp_path / name), *words, *more).stdout
        for name, more in (("grey", ()), ("coloured", ()))
    }
    assert said == {"grey": True, "coloured": False}
    kept = invoke("encode", str(tmp_path / "grey"), *words, "--colours")
    assert "grey images" not in kept.stdout
