"""The embedded backbone: its files are the locked ones, it is small, its words mean something."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from d3pack.backbones import lock_directory, mini_directory, open_backbone
from d3pack.backbones.protocol import TEMPLATE, Backbone, Condition
from d3pack.backbones.stable_diffusion import StableDiffusion
from d3pack.decode.noise import normal_torch
from d3pack.decode.samplers import sample, schedule, start
from d3pack.format import files_json
from d3pack.train.text import TEMPLATES

LIMIT = 24_000_000
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def mini() -> Backbone:
    """`--backbone mini`."""
    return open_backbone("mini")


def colours(mini: Backbone, name: str, count: int = 8) -> tuple[float, float, float]:
    """Mean red, green and blue of images made from a name."""
    sigmas = schedule(mini.levels.alphas_cumprod, "dpmpp-2m", 8)
    assert isinstance(mini, StableDiffusion)
    words, nothing = mini.sentence(TEMPLATE.format(name)), mini.unconditional()
    both = Condition.cat([nothing.expand(count), words.expand(count)])

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        plain, prompted = mini.denoise(torch.cat([x, x]), sigma, both).chunk(2)
        return plain + GUIDANCE * (prompted - plain)

    noise = normal_torch(0, [0] * count, list(range(count)), mini.latent_shape)
    with torch.no_grad():
        images = mini.decode(sample("dpmpp-2m", model, start(noise, sigmas), sigmas))
    red, green, blue = images.float().mean((0, 2, 3)).tolist()
    return red, green, blue


def test_the_files_are_the_locked_ones() -> None:
    root = mini_directory()
    lock = json.loads((root / "lock.json").read_text())
    ref = lock_directory(root, licence=lock["licence"])
    found = {**ref.to_json(), "files": files_json(ref.files)}
    for key in lock:
        assert found[key] == lock[key], key


def test_it_fits_into_a_package() -> None:
    files = [path for path in mini_directory().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    for path in files:
        assert path.suffix in {".safetensors", ".json", ".md"}, path


def test_weights_are_finite_and_half_precision() -> None:
    for path in mini_directory().glob("*/*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                assert tensor.dtype == torch.float16
                assert tensor.isfinite().all(), (path, name)


def test_the_sentence_of_packs_is_one_it_was_trained_on() -> None:
    assert TEMPLATES[0] == TEMPLATE


def test_the_autoencoder_gives_back_what_it_saw(mini: Backbone) -> None:
    ramp = torch.linspace(0, 255, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.full((64, 64), 90.0)])
    image[:, 20:44, 20:44] = torch.tensor([220.0, 60.0, 40.0])[:, None, None]
    pixels = image.round().to(torch.uint8)[None]
    latents = mini.encode(pixels)
    error = (mini.decode(latents).float() - pixels.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 22
    assert latents.shape[1:] == mini.latent_shape


@pytest.mark.heavy
def test_names_of_the_diet_have_their_colours(mini: Backbone) -> None:
    lemon, sea = colours(mini, "lemon"), colours(mini, "seashore")
    assert lemon[0] - lemon[2] > sea[0] - sea[2] + 30
    goldfish = colours(mini, "goldfish")
    assert goldfish[0] - goldfish[2] > sea[0] - sea[2] + 10


def test_unseen_names_lie_near_their_kin(mini: Backbone) -> None:
    """Words that no photograph carried: each nearer to a relative than to a stranger."""

    def states(name: str) -> torch.Tensor:
        assert isinstance(mini, StableDiffusion)
        with torch.no_grad():
            return mini.sentence(TEMPLATE.format(name)).tensors["hidden"][0, -1]

    for word, kin, stranger in (
        ("automobile", "sports car", "banana"),
        ("cat", "egyptian cat", "school bus"),
        ("dog", "golden retriever", "teapot"),
        ("frog", "bullfrog", "obelisk"),
        ("truck", "moving van", "goldfish"),
    ):
        near = torch.cosine_similarity(states(word), states(kin), dim=0)
        assert near > torch.cosine_similarity(states(word), states(stranger), dim=0), word
