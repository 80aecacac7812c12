"""Collages, clusters, the order of seeds, soft labels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d3pack.encode.candidates import (
    Answers,
    candidates_of,
    lanes_of,
    pick_order,
    probabilities,
)
from d3pack.encode.methods.d3m.collages import Collages, clusters, make_collages
from d3pack.errors import SourceError
from d3pack.sources import Source, open_source
from d3pack.teachers import Cut, best_patches, collage_order, tile
from d3pack.teachers.patches import crop_box, resized_crop_box

# -- collages ---------------------------------------------------------------------------------


class Brightness:
    """A teacher one can compute by hand: class c likes its own colour channel."""

    classes = CLASSES
    record: ClassVar[dict[str, object]] = {}

    def logits(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 25

    def features(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1)


def cut(factor: int = 2, **changes: object) -> Cut:
    values: dict[str, object] = {
        "size": (16 // factor, 16 // factor),
        "pool": 100,
        "crops": 3,
        "scale": (0.2, 0.8),
        "seed": 3,
    }
    return Cut(**{**values, **changes})  # type: ignore[arg-type]


def collages(
    source: Source, c: int, factor: int = 2, most: int = 10, **changes: object
) -> Collages:
    return make_collages(source, c, Brightness(), cut(factor, **changes), factor, most)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.25, 4),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_crop_boxes_lie_inside_the_image(
    width: int, height: int, aspect: float, low: float, seed: int
) -> None:
    x0, y0, x1, y1 = crop_box(width, height, aspect, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


def test_crop_of_the_whole_area_is_centred() -> None:
    assert crop_box(30, 10, 1.0, (1.0, 1.0), np.random.default_rng(0)) == (10, 0, 20, 10)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (500, 375), (40, 400), (1, 9)])
def test_rdeds_boxes_are_squares_of_a_share_of_the_area(width: int, height: int) -> None:
    """RandomResizedCrop with ratio (1, 1): side sqrt(area u), redrawn where it does not fit."""
    rng, draws = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(50):
        x0, y0, x1, y1 = resized_crop_box(width, height, (0.08, 1.0), rng)
        for _ in range(10):
            side = round((width * height * draws.uniform(0.08, 1.0)) ** 0.5)
            if side <= min(width, height):
                place = draws.integers(width - side + 1), draws.integers(height - side + 1)
                assert (x0, y0, x1, y1) == (*place, place[0] + side, place[1] + side)
                break
        else:  # ten draws, and none fits: the middle
            side = min(width, height)
            assert (x1 - x0, y1 - y0) == (side, side)
            assert (x0, y0) == ((width - side) // 2, (height - side) // 2)


@pytest.mark.parametrize("zero", [None, (10, 20, 30)])
def test_teacher_sees_a_patch_among_its_zeros(
    tmp_path: Path, zero: tuple[int, int, int] | None
) -> None:
    seen: list[Tensor] = []

    class Watching(Brightness):
        def logits(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().logits(images)

    source = open_source(make_tree(tmp_path / "s", 4))
    framed = cut(padded=(16, 16), as_rded=True)
    teacher = Watching()
    if zero is not None:
        teacher.zero = zero  # type: ignore[attr-defined]
    patches = best_patches(source, 0, teacher, framed)
    assert patches.pixels.shape == (4, 3, 8, 8)
    (looked,) = seen
    assert looked.shape == (12, 3, 16, 16)
    grey = torch.tensor(zero or [124, 116, 104], dtype=torch.uint8)[:, None, None]
    border = looked.clone()
    border[:, :, 4:12, 4:12] = grey
    assert torch.equal(border, grey.expand_as(border))
    trials = looked[:, :, 4:12, 4:12].numpy()
    assert all(any(np.array_equal(p, t) for t in trials) for p in patches.pixels)


def test_collage_order_strides() -> None:
    assert collage_order(3, 2).tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert collage_order(4, 1).tolist() == [0, 1, 2, 3]


def test_tiles_go_row_by_row() -> None:
    patches = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    assert tile(patches, 2)[0, 0].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert np.array_equal(tile(patches, 1), patches)


def test_collages_take_the_patches_of_least_cross_entropy(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 24))
    patches = best_patches(source, 1, Brightness(), cut())
    assert patches.pixels.shape == (24, 3, 8, 8)
    assert patches.bad == 0
    made = collages(source, 1, most=3)
    assert made.images.shape == (3, 3, 16, 16)
    best = patches.pixels[np.argsort(patches.costs, kind="stable")[:12]]
    # as RDED's mix_images: collage i of n has the ranks i, n + i, 2n + i and 3n + i, row by row
    for i, image in enumerate(made.images.numpy()):
        corners = (image[:, :8, :8], image[:, :8, 8:], image[:, 8:, :8], image[:, 8:, 8:])
        assert all(np.array_equal(corner, best[i + 3 * k]) for k, corner in enumerate(corners))
    assert made.realism < float(patches.costs.mean())
    again = collages(source, 1, most=3)
    assert torch.equal(made.images, again.images)
    other = collages(source, 1, most=3, seed=4)
    assert not torch.equal(made.images, other.images)


def test_more_crops_find_better_patches(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 12))
    one = best_patches(source, 0, Brightness(), cut(crops=1)).costs
    many = best_patches(source, 0, Brightness(), cut(crops=9)).costs
    assert many.mean() < one.mean()


def test_one_image_fills_a_collage(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 1))
    made = collages(source, 0, factor=4)
    assert made.images.shape == (1, 3, 16, 16)
    assert made.seen == 1


def test_bad_images_are_replaced_by_others_of_the_pool(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 10)
    for i in range(0, 10, 2):
        (root / "lemon" / f"{i:03d}.png").write_bytes(b"junk")
    made = collages(open_source(root), 1, factor=1, pool=4)
    assert made.seen == 4
    assert 0 <= made.bad <= 5
    for i in range(1, 10, 2):
        (root / "lemon" / f"{i:03d}.png").write_bytes(b"junk")
    with pytest.raises(SourceError, match="no image of class 'lemon' can be read"):
        collages(open_source(root), 1)


@pytest.mark.parametrize(("rows", "count"), [(9, 4), (10, 3), (12, 4), (7, 7), (40, 1)])
def test_clusters_are_equal_in_size(rows: int, count: int) -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 5)))
    sizes = np.bincount(clusters(points, count, 0), minlength=count)
    assert sizes.sum() == rows
    assert sizes.max() - sizes.min() <= 1


def test_clusters_keep_near_points_together() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(3), 20))
    points = torch.from_numpy(np.eye(3)[truth] * 10 + rng.standard_normal((60, 3)))
    found = clusters(points, 3, 0)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}) == 3


def test_fewer_images_than_clusters_have_one_each() -> None:
    assert clusters(torch.zeros(2, 4), 5, 0).tolist() == [0, 1]


# -- seeds and labels -------------------------------------------------------------------------


def answers(count: int = 24, seed: int = 0) -> Answers:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Answers(
        rng.standard_normal((count, 3)).astype(np.float32) * 3, features.astype(np.float32)
    )


@pytest.mark.parametrize("lanes", [1, 2, 3, 12])
def test_first_k_picks_are_those_chosen_for_k(lanes: int) -> None:
    whole = pick_order(answers(), 1, 12, lanes)
    assert len(set(whole.tolist())) == 12
    assert (whole % lanes == np.arange(12) % lanes).all()
    for k in (1, 5, 8):
        assert np.array_equal(pick_order(answers(), 1, k, lanes), whole[:k])


def test_every_mode_has_candidates_of_its_own() -> None:
    assert lanes_of(50, 1) == 50
    assert lanes_of(50, 4) == 52
    assert lanes_of(50, 1, 8) == 7
    for n, m, share in itertools.product(range(1, 20), range(1, 9), (1, 8)):
        lanes, every = lanes_of(n, m, share), candidates_of(n, m, 8, share)
        assert lanes % m == every % lanes == 0
        assert every >= 8 * n  # and so deep that eight times eight choices take six bits
        assert every // lanes <= 8 * share


def test_picks_are_believed_by_the_teacher_and_unlike_each_other() -> None:
    found = answers()
    logp = np.log(probabilities(found.logits, 1.0))[:, 1]
    order = pick_order(found, 1, 8, 1)
    assert order[0] == logp.argmax()
    assert logp[order].mean() > np.sort(logp)[-12:].mean() - 1.0
    twins = Answers(np.zeros((4, 2), np.float32), np.eye(2, dtype=np.float32)[[0, 0, 0, 1]])
    assert set(pick_order(twins, 0, 2, 1).tolist()) == {0, 3}


def test_probabilities_soften_with_temperature() -> None:
    logits = np.array([[2.0, 0.0, -1.0]], np.float32)
    sharp, soft = probabilities(logits, 1.0), probabilities(logits, 4.0)
    assert np.allclose(sharp, np.exp(logits) / np.exp(logits).sum())
    assert soft.max() < sharp.max()
    assert abs(soft.sum() - 1) < 1e-6
