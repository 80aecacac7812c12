"""A few decoded images of some classes of a pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from d3pack.decode import Decoder
from d3pack.format.pack import Pack
from d3pack.preview.contact import Row, contact_sheet

Progress = Callable[[int, int], None]  # images done, in all


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded images: `images[r, i]` is image i of class `classes[r]`."""

    classes: tuple[int, ...]
    images: npt.NDArray[np.uint8]  # (R, I, 3, h, w)


def sample(
    pack: Pack, decoder: Decoder, *, classes: int, images: int, progress: Progress | None = None
) -> Sample:
    """Decode the first images of classes spread evenly over the pack."""
    rows = min(classes, len(pack.classes))
    chosen = tuple(int(c) for c in np.linspace(0, len(pack.classes) - 1, rows).round())
    columns = min(images, pack.images_per_class)
    pairs = [(c, i) for c in chosen for i in range(columns)]
    parts = []
    for positions, made in decoder.stream(pairs):
        parts.append(made.cpu().numpy())
        if progress:
            progress(positions.stop, len(pairs))
    decoded = np.concatenate(parts)
    return Sample(chosen, decoded.reshape(rows, columns, *decoded.shape[1:]))


def render_sheet(pack: Pack, shown: Sample, *, title: str) -> Image.Image:
    """The sample as one picture."""
    rows = [
        Row(pack.classes[c], images) for c, images in zip(shown.classes, shown.images, strict=True)
    ]
    return contact_sheet(rows, title=title)
