"""Transforms of the user's own, and what is said when one of them fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from d3pack.errors import D3MError

Transform = Callable[[Any], Any]
Output = Literal["uint8", "float", "pil"]
OUTPUTS: tuple[Output, ...] = ("uint8", "float", "pil")


class TransformError(D3MError):
    """A transform raised; the message names the image."""

    code = "E_TRANSFORM"


def as_output(images: Tensor, output: Output) -> Tensor:
    """NCHW uint8 as the dataset hands it to batch transforms: uint8, or float in [0, 1]."""
    return images.to(torch.float32).div_(255) if output == "float" else images


def as_pil(image: Tensor) -> Image.Image:
    """One CHW uint8 tensor as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def apply_one(transform: Transform, image: Any, index: int, class_name: str) -> Any:
    """Apply a per-sample transform; a failure names index and class."""
    try:
        return transform(image)
    except Exception as error:
        raise TransformError(
            f"transform failed on image {index} (class {class_name!r}): "
            f"{type(error).__name__}: {error}",
            hint="call it on ds[i] of a dataset without transform to see the input",
        ) from error


def apply_batch(transform: Transform, images: Tensor, indices: list[int], first: str) -> Any:
    """Apply a per-batch transform; a failure names the batch, a lost image is refused."""
    where = f"images {indices[0]}..{indices[-1]} ({len(indices)}, class {first!r} first)"
    try:
        result = transform(images)
    except Exception as error:
        raise TransformError(
            f"batch_transform failed on {where}: {type(error).__name__}: {error}",
            hint="it is given a whole NCHW batch; per-sample code goes to transform=",
        ) from error
    if not hasattr(result, "__len__") or len(result) != len(indices):
        got = f"{len(result)} rows" if hasattr(result, "__len__") else type(result).__name__
        raise TransformError(
            f"batch_transform returned {got} for {where}",
            hint="a batch transform returns one row for each image",
        )
    return result
