"""Images of codes: plain sampling, with chosen noise in place of fresh noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_pack, tiny_sd

from d3pack.backbones import to_uint8
from d3pack.decode import Decoder, noise, samplers
from d3pack.format import Codes, Coding, Pack, encode_codes

CODING = Coding(sigmas=(8.0, 2.0, 0.5, 0.0), atoms=(1, 2, 0), bits=4)
LAST = 2**24 - 1  # the epoch of the codebooks


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "sd"
    tiny_sd(folder)
    return folder


@pytest.fixture(scope="module")
def pack(backbone: Path) -> Pack:
    """Three codes make the first five of eight images."""
    rng = np.random.default_rng(3)
    seeded = tiny_pack(backbone)
    shape = (len(seeded.classes), 3)
    single = rng.integers(0, 16, (*shape, 1))
    double = np.sort(np.stack([rng.choice(16, 2, replace=False) for _ in range(math.prod(shape))]))
    atoms = np.concatenate([single, double.reshape(*shape, 2)], -1)
    signs = rng.choice([-1, 1], atoms.shape).astype(np.int8)
    codes = encode_codes(Codes(CODING, 5, atoms, signs))
    whole: Pack = replace(seeded, images_per_class=8, codes=codes, probes=None, labels=None)
    return whole


@pytest.fixture(scope="module")
def decoder(pack: Pack, backbone: Path) -> Decoder:
    return Decoder(pack, device="cpu", path=backbone)


def by_hand(decoder: Decoder, c: int, i: int) -> torch.Tensor:
    """The image as the specification says it, with NumPy's noise and DDPM's step."""
    pack, shape = decoder.pack, decoder.latent_shape
    assert pack.codes is not None
    from d3pack.format import decode_codes

    codes = decode_codes(pack.codes)
    atoms, signs = codes.atoms[c, i % 3], codes.signs[c, i % 3]

    def entry(level: int, place: int) -> torch.Tensor:
        draw = LAST * 256 + level
        found = noise.normal(pack.seed, 0, [int(atoms[place])], shape, draw=draw)
        return torch.from_numpy(found) * float(signs[place])

    drawn = [
        entry(0, 0),
        (entry(1, 1) + entry(1, 2)) * (1 / math.sqrt(2)),
        torch.from_numpy(noise.normal(pack.seed, c, [i], shape, draw=2)),
    ]
    group = pack.recipe.group
    condition = decoder.backbone.condition(decoder._prompts[c, 0][None], pack.recipe.template)
    x = drawn[0].expand(group, *shape) * math.sqrt(8.0**2 + 1)
    with torch.inference_mode():
        for level, (high, low) in enumerate([(8.0, 2.0), (2.0, 0.5), (0.5, 0.0)], 1):
            x0 = decoder.backbone.denoise(x, high, condition.expand(group))
            ratio = low * low / (high * high)
            x = x * ratio + x0 * (1 - ratio)
            if low:
                x = x + drawn[level] * (low * math.sqrt(high * high - low * low) / high)
        return to_uint8(decoder.backbone.decode_float(x))[0]


@pytest.mark.parametrize("image", [(0, 0), (2, 2), (1, 4)])
def test_image_is_the_one_of_the_specification(decoder: Decoder, image: tuple[int, int]) -> None:
    found = decoder.images([image])[0].int()
    assert (found - by_hand(decoder, *image).int()).abs().max() <= 1


@pytest.mark.heavy
def test_image_does_not_depend_on_its_company(decoder: Decoder) -> None:
    pairs = [(c, i) for c in range(3) for i in range(8)]
    alone = torch.cat([decoder.images([pair]) for pair in pairs])
    order = np.random.default_rng(0).permutation(len(pairs))
    assert torch.equal(decoder.images([pairs[k] for k in order]), alone[order])


def test_seeded_images_are_those_of_a_pack_without_codes(decoder: Decoder, backbone: Path) -> None:
    plain = Decoder(replace(decoder.pack, images_per_class=3, codes=None), path=backbone)
    behind = decoder.images([(c, 5 + i) for c in range(3) for i in range(3)])
    assert torch.equal(behind, plain.images(range(9)))


def test_time_of_an_image_counts_the_atoms_of_its_code(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def a_second(work: Callable[[], Any], **_: Any) -> float:
        work()
        return 1.0

    monkeypatch.setattr("d3pack.decode.decoder.seconds_of", a_second)
    seeded, pixels = decoder.time_one((0, 5))
    atoms = sum(CODING.atoms) / len(CODING.atoms)
    assert decoder.time_one((0, 0)) == (seeded * (1 + atoms), pixels)


def test_images_of_one_code_differ_by_fresh_noise(decoder: Decoder) -> None:
    assert decoder.pack.codes is not None
    assert decoder.pack.codes.params["codes"] == 3
    first, again = decoder.images([(0, 0), (0, 3)])
    assert not torch.equal(first, again)


def test_epochs_change_fresh_noise_alone(pack: Pack, backbone: Path) -> None:
    assert pack.codes is not None
    with Decoder(pack, path=backbone) as decoder:
        assert not torch.equal(decoder.images([(0, 0)]), decoder.images([(0, 0)], epoch=1))
    rng = np.random.default_rng(0)
    coding = replace(CODING, atoms=(1, 1, 1))
    atoms, signs = rng.integers(0, 16, (3, 3, 3)), np.ones((3, 3, 3), np.int8)
    chosen = replace(pack, codes=encode_codes(Codes(coding, 5, atoms, signs)))
    with Decoder(chosen, path=backbone) as decoder:
        assert torch.equal(decoder.images([(0, 0)]), decoder.images([(0, 0)], epoch=1))


def test_parts_of_a_pack_keep_their_images(pack: Pack, backbone: Path, decoder: Decoder) -> None:
    part = pack.select([2, 0]).first(4)
    images = Decoder(part, path=backbone).images(range(8))
    assert torch.equal(images, decoder.images([(c, i) for c in (2, 0) for i in range(4)]))


def test_guidance_and_prompts_are_those_of_the_codes(pack: Pack, backbone: Path) -> None:
    assert pack.codes is not None
    made = []
    for changes in ({}, {"guidance": 3.0}, {"prompts": False}):
        params = {**pack.codes.params, **changes}
        codes = replace(pack.codes, params=params)
        made.append(Decoder(replace(pack, codes=codes), path=backbone).images([(1, 0)]))
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_ancestral_steps_are_those_of_ddpm() -> None:
    sigmas = (9.0, 4.0, 1.5, 0.0)
    steps = samplers.plan("ancestral", sigmas, {"eta": 1.0})
    for step, (high, low) in zip(steps, [(9.0, 4.0), (4.0, 1.5), (1.5, 0.0)], strict=True):
        # the posterior of x at `low`, given x at `high` and x0
        assert step.a == pytest.approx(low**2 / high**2)
        assert list(step.b) == pytest.approx([1 - low**2 / high**2])
        assert step.c == pytest.approx(low * math.sqrt(1 - low**2 / high**2))


@pytest.mark.parametrize(("eta", "like"), [(0.0, "euler"), (1000.0, "lcm")])
def test_ancestral_sampling_ends_in_known_samplers(eta: float, like: str) -> None:
    sigmas = (9.0, 4.0, 1.5, 0.0)
    assert samplers.plan("ancestral", sigmas, {"eta": eta}) == samplers.plan(like, sigmas)


def test_recipe_with_the_ancestral_sampler_decodes(pack: Pack, backbone: Path) -> None:
    recipe = replace(pack.recipe, sampler="ancestral", extra={"eta": 1.0})
    plain = replace(pack, codes=None, recipe=recipe)
    decoder = Decoder(plain, path=backbone)
    assert torch.equal(decoder.images([(0, 1), (0, 0)])[1], decoder.images([(0, 0)])[0])
