"""Sheets of images for the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write `images` (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
