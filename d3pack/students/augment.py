"""Augmentations of a protocol applied to batches, on the device that the batch is on.

`apply` takes an operation, a batch (N, 3, H, W) of floats and a CPU generator, so that the draws
are the same on every device. To add an operation, add its values to `protocols.py` and a function
with `@apply.register` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

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


def apply_all(ops: tuple[BatchOp, ...], x: Tensor, rng: Generator) -> Tensor:
    """Apply operations one after the other."""
    for op in ops:
        x = apply(op, x, rng)
    return x


@singledispatch
def apply(op: BatchOp, x: Tensor, rng: Generator) -> Tensor:
    """Return the augmented batch, of the same shape."""
    raise TypeError(f"{op!r} is not an augmentation")


def _uniform(x: Tensor, rng: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One number per image, shaped to broadcast."""
    draws = torch.rand(len(x), 1, 1, 1, generator=rng)
    return (draws * (high - low) + low).to(x.device, x.dtype)


def _integers(x: Tensor, rng: Generator, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (len(x), 1), generator=rng).to(x.device)


def _sample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values at per-image pixel coordinates rows (N, H'), columns (N, W')."""
    height, width = x.shape[2:]
    grid_y = ((rows + 0.5) * 2 / height - 1)[:, :, None].expand(-1, -1, columns.shape[1])
    grid_x = ((columns + 0.5) * 2 / width - 1)[:, None, :].expand(-1, rows.shape[1], -1)
    grid = torch.stack([grid_x, grid_y], dim=-1).to(x.dtype)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    """An affine map per image; pixels from outside are 0, the mean of normalised images."""
    grid = F.affine_grid(theta.to(x.device, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@apply.register
def _flip(op: Flip, x: Tensor, rng: Generator) -> Tensor:
    return torch.where(_uniform(x, rng) < op.p, x.flip(3), x)


@apply.register
def _random_resized_crop(op: RandomResizedCrop, x: Tensor, rng: Generator) -> Tensor:
    count, _, height, width = x.shape
    draws = torch.rand(2, count, op.tries, generator=rng)
    area = height * width * (op.scale[0] + draws[0] * (op.scale[1] - op.scale[0]))
    low, high = math.log(op.ratio[0]), math.log(op.ratio[1])
    aspect = torch.exp(low + draws[1] * (high - low))
    w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # 0 too where nothing fits, replaced below
    any_fits = fits.any(1, keepdim=True)
    w = torch.where(any_fits, w.gather(1, first), float(width))
    h = torch.where(any_fits, h.gather(1, first), float(height))
    place = torch.rand(2, count, 1, generator=rng)
    left, top = (place[0] * (width - w + 1)).floor(), (place[1] * (height - h + 1)).floor()
    # Stay between the centres of the window's own border pixels, as resizing a crop does.
    columns = left + ((torch.arange(width) + 0.5) * w / width - 0.5).clamp(min=0)
    rows = top + ((torch.arange(height) + 0.5) * h / height - 0.5).clamp(min=0)
    columns, rows = torch.minimum(columns, left + w - 1), torch.minimum(rows, top + h - 1)
    return _sample(x, rows.to(x.device), columns.to(x.device))


@apply.register
def _color_jitter(op: ColorJitter, x: Tensor, rng: Generator) -> Tensor:
    order = torch.rand(len(x), 3, generator=rng).argsort(1).to(x.device)
    amounts = [_uniform(x, rng, -op.strength, op.strength) for _ in range(3)]
    weights = x.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    for turn in range(3):
        which = order[:, turn, None, None, None]
        grey = (x * weights).sum(1, keepdim=True)
        targets = (torch.zeros_like(grey), grey.mean((2, 3), keepdim=True), grey)
        moved = x
        for number, (target, amount) in enumerate(zip(targets, amounts, strict=True)):
            moved = torch.where(which == number, x + (target - x) * amount, moved)
        x = moved
    return x


@apply.register
def _lighting(op: Lighting, x: Tensor, rng: Generator) -> Tensor:
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    alpha = torch.randn(len(x), 3, generator=rng) * op.std
    return x + ((alpha * values) @ vectors.T)[:, :, None, None].to(x.device, x.dtype)


@apply.register
def _shuffle_patches(op: ShufflePatches, x: Tensor, rng: Generator) -> Tensor:
    for axis in (3, 2):
        side = x.shape[axis]
        tile = (torch.arange(side) // (side // op.factor)).clamp(max=op.factor - 1)
        rank = torch.rand(len(x), op.factor, generator=rng).argsort(1)
        order = rank[:, tile].argsort(dim=1, stable=True).to(x.device)
        shape = [len(x), 1, 1, 1]
        shape[axis] = side
        x = x.gather(axis, order.view(shape).expand_as(x))
    return x


@apply.register
def _dsa(op: DSA, x: Tensor, rng: Generator) -> Tensor:
    number = int(torch.randint(len(op.strategy), (1,), generator=rng))
    return _DSA_OPS[op.strategy[number]](x, rng)


def _dsa_color(x: Tensor, rng: Generator) -> Tensor:
    x = x + _uniform(x, rng, -0.5, 0.5)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * _uniform(x, rng, 0.0, 2.0) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * _uniform(x, rng, 0.5, 1.5) + mean


def _dsa_crop(x: Tensor, rng: Generator) -> Tensor:
    """Shift by up to an eighth; what moves in is 0."""
    for axis in (2, 3):
        side = x.shape[axis]
        reach = int(side * 0.125 + 0.5)
        source = torch.arange(side, device=x.device) + _integers(x, rng, -reach, reach + 1)
        shape = [len(x), 1, 1, 1]
        shape[axis] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        x = x.gather(axis, source.clamp(0, side - 1).view(shape).expand_as(x)) * inside
    return x


def _dsa_cutout(x: Tensor, rng: Generator) -> Tensor:
    """Set a square of half the side to 0; it may hang over the border."""
    masks = []
    for axis in (2, 3):
        side = x.shape[axis]
        hole = int(side * 0.5 + 0.5)
        start = _integers(x, rng, 0, side + (1 - hole % 2)) - hole // 2
        place = torch.arange(side, device=x.device)
        masks.append((place >= start) & (place < start + hole))
    return x * ~(masks[0][:, None, :, None] & masks[1][:, None, None, :])


def _dsa_flip(x: Tensor, rng: Generator) -> Tensor:
    return apply(Flip(), x, rng)


def _dsa_scale(x: Tensor, rng: Generator) -> Tensor:
    theta = torch.zeros(len(x), 2, 3)
    theta[:, [0, 1], [0, 1]] = torch.rand(len(x), 2, generator=rng) * (1.2 - 1 / 1.2) + 1 / 1.2
    return _warp(x, theta)


def _dsa_rotate(x: Tensor, rng: Generator) -> Tensor:
    angle = (torch.rand(len(x), generator=rng) - 0.5) * 2 * math.radians(15.0)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin(), angle.sin()
    return _warp(x, theta)


_DSA_OPS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "color": _dsa_color,
    "crop": _dsa_crop,
    "cutout": _dsa_cutout,
    "flip": _dsa_flip,
    "scale": _dsa_scale,
    "rotate": _dsa_rotate,
}


def cutmix(op: CutMix, x: Tensor, targets: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """Return images, and label distributions (N, classes) mixed by the area that was kept."""
    if float(torch.rand(1, generator=rng)) >= op.p:
        return x, targets
    seed = int(torch.randint(2**31, (1,), generator=rng))
    share = np.random.default_rng(seed).beta(op.beta, op.beta)
    spans = []
    for side in x.shape[2:]:
        cut = int(side * math.sqrt(1.0 - share))
        centre = int(torch.randint(side, (1,), generator=rng))
        spans.append((max(centre - cut // 2, 0), min(centre + cut // 2, side)))
    (top, bottom), (left, right) = spans
    order = torch.randperm(len(x), generator=rng).to(x.device)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    kept = 1.0 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    return mixed, targets * kept + targets[order] * (1.0 - kept)
