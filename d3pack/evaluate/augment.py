"""Augmentations of whole batches, on the device the batch lives on.

Each is a frozen value called with a batch (N, 3, H, W) of floats and a CPU generator: the draws are
the same on every device. `CutMix` also mixes the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class BatchOp(Protocol):
    """Anything that turns a batch into an augmented batch of the same shape."""

    def __call__(self, x: Tensor, rng: Generator) -> Tensor: ...


def _uniform(x: Tensor, rng: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One number an image, shaped to broadcast."""
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
    """An affine map an image; what comes from outside is 0, the mean of normalised images."""
    grid = F.affine_grid(theta.to(x.device, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirror left-right with probability p."""

    p: float = 0.5

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        return torch.where(_uniform(x, rng) < self.p, x.flip(3), x)


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A random window resized to the full size, drawn as torchvision does."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    tries: int = 10

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        count, _, height, width = x.shape
        draws = torch.rand(2, count, self.tries, generator=rng)
        area = height * width * (self.scale[0] + draws[0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + draws[1] * (high - low))
        w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)  # 0 too where nothing fits, replaced below
        found = fits.any(1, keepdim=True)
        w = torch.where(found, w.gather(1, first), float(width))
        h = torch.where(found, h.gather(1, first), float(height))
        place = torch.rand(2, count, 1, generator=rng)
        left, top = (place[0] * (width - w + 1)).floor(), (place[1] * (height - h + 1)).floor()
        # Stay between the centres of the window's own border pixels, as resizing a crop does.
        columns = left + ((torch.arange(width) + 0.5) * w / width - 0.5).clamp(min=0)
        rows = top + ((torch.arange(height) + 0.5) * h / height - 0.5).clamp(min=0)
        columns, rows = torch.minimum(columns, left + w - 1), torch.minimum(rows, top + h - 1)
        return _sample(x, rows.to(x.device), columns.to(x.device))


def _grey(x: Tensor) -> Tensor:
    weights = x.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (x * weights).sum(1, keepdim=True)


@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Brightness, contrast and saturation each moved by up to `strength`, in random order."""

    strength: float = 0.4

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        order = torch.rand(len(x), 3, generator=rng).argsort(1).to(x.device)
        amounts = [_uniform(x, rng, -self.strength, self.strength) for _ in range(3)]
        for turn in range(3):
            which = order[:, turn, None, None, None]
            grey = _grey(x)
            targets = (torch.zeros_like(grey), grey.mean((2, 3), keepdim=True), grey)
            moved = x
            for op, (target, amount) in enumerate(zip(targets, amounts, strict=True)):
                moved = torch.where(which == op, x + (target - x) * amount, moved)
            x = moved
        return x


@dataclass(frozen=True, slots=True)
class Lighting:
    """AlexNet's noise along the principal colour axes of ImageNet."""

    std: float = 0.1

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        values = torch.tensor([0.2175, 0.0188, 0.0045])
        vectors = torch.tensor(
            [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
        )
        alpha = torch.randn(len(x), 3, generator=rng) * self.std
        return x + ((alpha * values) @ vectors.T)[:, :, None, None].to(x.device, x.dtype)


@dataclass(frozen=True, slots=True)
class ShufflePatches:
    """Cut into factor x factor tiles, shuffle columns and rows of tiles (RDED)."""

    factor: int

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        for axis in (3, 2):
            side = x.shape[axis]
            tile = (torch.arange(side) // (side // self.factor)).clamp(max=self.factor - 1)
            rank = torch.rand(len(x), self.factor, generator=rng).argsort(1)
            order = rank[:, tile].argsort(dim=1, stable=True).to(x.device)
            shape = [len(x), 1, 1, 1]
            shape[axis] = side
            x = x.gather(axis, order.view(shape).expand_as(x))
        return x


@dataclass(frozen=True, slots=True)
class DSA:
    """Differentiable siamese augmentation (arXiv 2102.08259): one operation a batch, drawn anew."""

    strategy: tuple[str, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        pick = int(torch.randint(len(self.strategy), (1,), generator=rng))
        return _DSA_OPS[self.strategy[pick]](x, rng)


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
    """A square of half the side becomes 0; it may hang over the border."""
    masks = []
    for axis in (2, 3):
        side = x.shape[axis]
        hole = int(side * 0.5 + 0.5)
        start = _integers(x, rng, 0, side + (1 - hole % 2)) - hole // 2
        place = torch.arange(side, device=x.device)
        masks.append((place >= start) & (place < start + hole))
    return x * ~(masks[0][:, None, :, None] & masks[1][:, None, None, :])


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
    "flip": Flip(),
    "scale": _dsa_scale,
    "rotate": _dsa_rotate,
}


@dataclass(frozen=True, slots=True)
class CutMix:
    """Paste one rectangle of a shuffled batch over the batch (arXiv 1905.04899)."""

    p: float = 1.0
    beta: float = 1.0

    def __call__(self, x: Tensor, targets: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
        """Images and the label distributions (N, classes), mixed by the area that was kept."""
        if float(torch.rand(1, generator=rng)) >= self.p:
            return x, targets
        seed = int(torch.randint(2**31, (1,), generator=rng))
        share = np.random.default_rng(seed).beta(self.beta, self.beta)
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


def apply(ops: Sequence[BatchOp], x: Tensor, rng: Generator) -> Tensor:
    """One operation after the other."""
    for op in ops:
        x = op(x, rng)
    return x
