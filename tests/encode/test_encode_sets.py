"""Picks of whole sets: S3, the best of many draws, and what they cost."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import quick, settings_of
from torch import Tensor
from torch.nn import functional

from d3pack.decode import Decoder, noise
from d3pack.encode import EncodeSettings, encode, estimate_encode
from d3pack.encode import sets as sets_module
from d3pack.encode.sets import APART, NEAR, centroids, off_normal, separate_sets
from d3pack.errors import UsageError
from d3pack.format import decode_picks, read


def directions(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=rng) + 1, dim=-1)


def objective(made: Tensor, real: Tensor, chosen: tuple[int, ...]) -> float:
    """The published objective, written out."""
    picked = [made[c, g].double() for c, g in enumerate(chosen)]
    near = sum(-torch.log(1 - one @ r.double()) for one, r in zip(picked, real, strict=True))
    apart = sum(torch.log(1 - a @ b) for a, b in itertools.combinations(picked, 2))
    return float(NEAR * near + APART * apart)


def test_no_other_set_of_one_class_is_better() -> None:
    made, real = directions(4, 5, 6), directions(4, 6, seed=1)
    chosen = tuple(separate_sets(made, real).tolist())
    best = objective(made, real, chosen)
    for c, g in itertools.product(range(4), range(5)):
        assert objective(made, real, (*chosen[:c], g, *chosen[c + 1 :])) <= best + 1e-9
    nearest = tuple(torch.einsum("cgf,cf->cg", made, real).argmax(1).tolist())
    assert chosen != nearest
    assert objective(made, real, nearest) < best


def test_set_that_is_like_another_class_is_left() -> None:
    """It is the nearest to its real images, but another one is nearly as near."""
    real = torch.eye(4)[:2]
    between = functional.normalize(torch.tensor([1.0, 0.9, 0, 0]), dim=0)
    aside = functional.normalize(torch.tensor([1.0, 0, 1.0, 0]), dim=0)
    made = torch.stack([torch.stack([between, aside]), torch.stack([between, between])])
    assert (between @ real[0] > aside @ real[0]).item()
    assert separate_sets(made, real)[0] == 1


def test_one_class_takes_the_nearest_set() -> None:
    made, real = directions(1, 5, 6), directions(1, 6, seed=2)
    assert separate_sets(made, real).item() == (made[0] @ real[0]).argmax()


def test_centroid_is_the_mean_direction() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert centroids(features)[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_sets_with_the_statistics_of_the_normal_are_nearer() -> None:
    rng = torch.Generator().manual_seed(0)
    half = torch.randn(1, 2, 500, generator=rng)
    balanced = torch.cat([half, -half], 1)
    balanced = balanced / balanced.std(1, keepdim=True)
    shifted, skewed = balanced + 1, (balanced + 3).square() / 6 - 1.5
    off = off_normal(torch.cat([balanced, shifted, 2 * balanced, skewed]))
    assert off.argmin() == 0
    assert off[0] < 1


def test_score_is_that_of_the_published_code() -> None:
    """Written out: values in the units of their place over the images, cubes summed by image."""
    drawn = np.random.default_rng(0).standard_normal((3, 5, 40))
    expected = []
    for images in drawn:
        mean, deviation = images.mean(0), images.std(0, ddof=1)
        skew = [sum(((x - mean) / deviation) ** 3) * 40 / (39 * 38) for x in images]
        errors = (np.linalg.norm(part) for part in (mean, deviation - 1, skew))
        expected.append(np.dot([1, 1, 0.1], list(errors)))
    assert off_normal(torch.from_numpy(drawn)).tolist() == pytest.approx(expected)
    alone = torch.from_numpy(drawn[:, :1])
    assert off_normal(alone).tolist() == pytest.approx(np.linalg.norm(drawn[:, 0], axis=1))


def sets(backbone: Path, select: str, **changes: Any) -> EncodeSettings:
    values: dict[str, Any] = {"modes": 1, "labels": "none", "steps": 2, "cool": 1, "guidance": 1.5}
    return quick(backbone, select=select, **{**values, **changes})


@pytest.mark.heavy
@pytest.mark.parametrize(("select", "count", "bits"), [("s3", 3, 2), ("draws", 64, 6)])
def test_pack_has_one_set_of_each_class(
    home: Path, tmp_path: Path, select: str, count: int, bits: int
) -> None:
    settings = sets(home / "sd", select, candidates=count)
    estimate = estimate_encode(home / "source", settings)
    pack = encode(home / "source", tmp_path / "a.d3m", settings)
    assert pack.picks is not None
    assert pack.picks.codec == "sets"
    assert pack.picks.params["bits"] <= bits
    assert pack.ledger().sections["picks"] == 3  # a byte a class, for four images
    chosen = decode_picks(pack.picks)
    assert (np.diff(chosen, axis=1) == 1).all()
    assert (chosen[:, 0] % 4 == 0).all()
    assert abs(estimate["bytes"] - (tmp_path / "a.d3m").stat().st_size) < 40
    assert any(f"best of {count} sets by {select}" in line for line in estimate["lines"])
    # the images are those of the candidates
    many = replace(pack, picks=None, images_per_class=4 * count)
    pairs = [(1, i) for i in range(4)]
    picked = [(1, int(i)) for i in chosen[1]]
    with Decoder(pack, path=home / "sd") as ours, Decoder(many, path=home / "sd") as all_of_them:
        assert torch.equal(ours.images(pairs), all_of_them.images(picked))


@pytest.mark.heavy
def test_draws_are_the_best_of_all(home: Path, tmp_path: Path) -> None:
    pack = encode(home / "source", tmp_path / "a.d3m", sets(home / "sd", "draws", candidates=32))
    assert pack.picks is not None
    for c, row in enumerate(decode_picks(pack.picks)):
        drawn = noise.normal(pack.seed, c, np.arange(128), (4, 8, 8)).reshape(32, 4, -1)
        assert row[0] == 4 * int(off_normal(torch.from_numpy(drawn)).argmin())


@pytest.mark.heavy
@pytest.mark.parametrize("select", ["s3", "draws"])
def test_every_image_keeps_its_mode(home: Path, tmp_path: Path, select: str) -> None:
    settings = sets(home / "sd", select, candidates=5, modes=2, images_per_class=3)
    pack = encode(home / "source", tmp_path / "a.d3m", settings)
    assert pack.picks is not None
    assert pack.picks.params["stride"] == 4
    assert (decode_picks(pack.picks) % 2 == [0, 1, 0]).all()
    assert read(tmp_path / "a.d3m").first(2).picks is not None


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("select", "work", "calls"), [("s3", "_unit_features", 5), ("draws", "_off", 2)]
)
def test_choice_that_was_stopped_goes_on_to_the_same_bytes(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    select: str,
    work: str,
    calls: int,
) -> None:
    settings = sets(home / "sd", select, candidates=4)
    encode(home / "source", tmp_path / "whole.d3m", settings)
    usual, made = getattr(sets_module, work), 0

    def stops(*arguments: Any) -> Tensor:
        nonlocal made
        made += 1
        if made == calls:
            raise KeyboardInterrupt
        found: Tensor = usual(*arguments)
        return found

    monkeypatch.setattr(sets_module, work, stops)
    with pytest.raises(KeyboardInterrupt):
        encode(home / "source", tmp_path / "cut.d3m", settings)
    before, made = made, calls
    encode(home / "source", tmp_path / "cut.d3m", settings)
    assert before == calls
    assert made - calls == 2, "what was done is not done again"
    assert (tmp_path / "cut.d3m").read_bytes() == (tmp_path / "whole.d3m").read_bytes()


@pytest.mark.heavy
def test_sets_of_other_numbers_have_their_defaults(home: Path) -> None:
    for select, said in (("s3", "best of 5 sets"), ("draws", "best of 4,096 sets")):
        settings = sets(home / "sd", select, candidates=None)
        lines = estimate_encode(home / "source", settings)["lines"]
        assert any(said in line for line in lines), lines


@pytest.mark.parametrize("method", ["codes", "modes"])
def test_methods_without_seeds_refuse_to_select(home: Path, tmp_path: Path, method: str) -> None:
    settings = settings_of(method=method, backbone=str(home / "sd"), select="s3")
    with pytest.raises(UsageError, match="no seeds to select"):
        encode(home / "source", tmp_path / "a.d3m", settings)
