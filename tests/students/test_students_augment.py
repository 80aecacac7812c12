"""Augmentations: the geometry they promise, the same draws on every run, nothing shared."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from d3pack.students.augment import apply, cutmix
from d3pack.students.protocols import (
    DSA,
    BatchOp,
    ColorJitter,
    CutMix,
    Flip,
    Lighting,
    RandomResizedCrop,
    ShufflePatches,
)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def batch(count: int = 16, size: int = 12) -> Tensor:
    return torch.rand(count, 3, size, size, generator=rng(9))


OPS = [
    Flip(),
    RandomResizedCrop((0.5, 1.0)),
    ColorJitter(),
    Lighting(),
    ShufflePatches(2),
    ShufflePatches(3),
    DSA(),
    *[DSA((name,)) for name in DSA().strategy],
]


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_shape_determinism_and_purity(op: BatchOp) -> None:
    x = batch()
    kept = x.clone()
    one, same, other = apply(op, x, rng(1)), apply(op, x, rng(1)), apply(op, x, rng(2))
    assert one.shape == x.shape
    assert one.dtype == x.dtype
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_images_are_drawn_apart(op: BatchOp) -> None:
    x = batch(1).expand(64, -1, -1, -1).contiguous()
    y = apply(op, x, rng(3)).flatten(1)
    assert len(torch.unique(y, dim=0)) > 1


def test_flip_mirrors_about_half() -> None:
    x = batch(400)
    y = apply(Flip(), x, rng())
    flipped = (y == x.flip(3)).flatten(1).all(1)
    assert torch.all(flipped | (y == x).flatten(1).all(1))
    assert 150 < int(flipped.sum()) < 250


def test_crop_is_a_resized_crop() -> None:
    """Each image equals `interpolate` of some window of itself."""
    x = batch(8, 16)
    y = apply(RandomResizedCrop((0.4, 0.9)), x, rng(4))
    for image, got in zip(x, y, strict=True):
        found = False
        for h in range(6, 17):
            for w in range(6, 17):
                windows = image.unfold(1, h, 1).unfold(2, w, 1)  # (3, top, left, h, w)
                flat = windows.flatten(1, 2).swapaxes(0, 1)
                resized = torch.nn.functional.interpolate(
                    flat, (16, 16), mode="bilinear", align_corners=False
                )
                found = found or bool(((resized - got).abs().amax((1, 2, 3)) < 1e-4).any())
        assert found


def test_crop_keeps_to_its_scale_and_ratio() -> None:
    """On a coordinate ramp the corners tell the window."""
    side = 64
    ramp = torch.arange(side, dtype=torch.float32)
    x = torch.stack(
        [ramp.expand(side, side), ramp[:, None].expand(side, side), ramp.expand(side, side)]
    )
    y = apply(RandomResizedCrop((0.5, 1.0)), x.expand(300, -1, -1, -1), rng(5))
    width = y[:, 0].amax((1, 2)) - y[:, 0].amin((1, 2)) + 1
    height = y[:, 1].amax((1, 2)) - y[:, 1].amin((1, 2)) + 1
    share, aspect = width * height / side**2, width / height
    assert 0.47 < float(share.min()) < 0.6
    assert float(share.max()) <= 1.0
    assert float(aspect.min()) > 0.72
    assert float(aspect.max()) < 1.39


def test_patches_are_permuted_not_changed() -> None:
    x = torch.arange(6 * 6, dtype=torch.float32).view(1, 1, 6, 6).expand(20, 3, 6, 6)
    y = apply(ShufflePatches(2), x, rng(6))
    for image in y:
        assert torch.equal(image.flatten(1).sort(1).values, x[0].flatten(1))
        left = image[0, 0, :3]
        assert torch.equal(left - left[0], torch.tensor([0.0, 1.0, 2.0]))  # tiles stay whole
    assert len(torch.unique(y.flatten(1), dim=0)) == 4


def test_odd_sizes_give_the_last_tile_the_rest() -> None:
    x = batch(5, 7)
    y = apply(ShufflePatches(2), x, rng(7))
    assert torch.equal(y.flatten(2).sort(2).values, x.flatten(2).sort(2).values)


def test_jitter_with_no_strength_is_identity() -> None:
    x = batch()
    torch.testing.assert_close(apply(ColorJitter(0.0), x, rng()), x)


def test_lighting_shifts_whole_channels() -> None:
    x = batch()
    shift = apply(Lighting(), x, rng()) - x
    torch.testing.assert_close(shift.std((2, 3)), torch.zeros(16, 3), atol=1e-6, rtol=0)


def test_dsa_cutout_blanks_half_a_side_at_most() -> None:
    y = apply(DSA(("cutout",)), torch.ones(200, 3, 32, 32), rng(8))
    blank = (y == 0).sum((1, 2, 3)) // 3
    assert int(blank.max()) == 16 * 16
    assert int(blank.min()) >= 8 * 8  # at the border a hole loses up to half of each side
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_dsa_crop_shifts_by_an_eighth_at_most() -> None:
    x = torch.zeros(300, 3, 32, 32)
    x[:, :, 16, 16] = 1
    y = apply(DSA(("crop",)), x, rng(9))
    _, _, rows, columns = torch.nonzero(y, as_tuple=True)
    assert (int(rows.min()), int(rows.max())) == (12, 20)
    assert (int(columns.min()), int(columns.max())) == (12, 20)


def test_dsa_draws_one_operation_a_batch() -> None:
    x = batch(64)
    unlike = 0
    for seed in range(30):
        y = apply(DSA(("flip", "color")), x, rng(seed))
        flips = (y == x).flatten(1).all(1) | (y == x.flip(3)).flatten(1).all(1)
        assert bool(flips.all()) or not bool(flips.any())
        unlike += not bool(flips.any())
    assert 5 < unlike < 25


def test_cutmix_mixes_images_and_labels_by_area() -> None:
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    targets = torch.eye(8)
    seen = set()
    for seed in range(20):
        mixed, labels = cutmix(CutMix(), x, targets, rng(seed))
        for image, label in zip(mixed, labels, strict=True):
            values, counts = image[0].unique(return_counts=True)
            shares = torch.zeros(8)
            shares[values.long()] = counts / 256
            torch.testing.assert_close(label, shares)
            seen.add(len(values))
    assert seen == {1, 2}


def test_cutmix_sometimes_stays_away() -> None:
    x, targets = batch(4), torch.eye(4)
    kept = sum(cutmix(CutMix(p=0.3), x, targets, rng(seed))[0] is x for seed in range(100))
    assert 50 < kept < 90
