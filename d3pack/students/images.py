"""Images in memory that a student is trained or tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images in memory with a class each, and the bytes that it takes to send them."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), the class of each
    nbytes: int | None = None  # None where nobody would send them
    note: str = ""
    soft: Tensor | None = None  # soft labels, probabilities (N, C), where there are some
    weights: Tensor | None = None  # in the loss, (N,), where they differ

    @classmethod
    def of(cls, classes: Sequence[Tensor]) -> LabelledImages:
        """Return images that lie class by class, (N, 3, H, W) each."""
        import torch  # the help of the command reads this module

        counts = torch.tensor([len(images) for images in classes])
        labels = torch.arange(len(classes)).repeat_interleave(counts)
        return cls(torch.cat(list(classes)), labels)
