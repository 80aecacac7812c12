"""Contact sheets: rows of small images with a name beside each, by NumPy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from d3pack.system import Counter, printable

if TYPE_CHECKING:
    from d3pack.decode import Decoder
    from d3pack.format import Pack

Images = npt.NDArray[np.uint8]  # (N, 3, h, w)

GAP = 4
PAPER = (250, 249, 247)
INK = (32, 33, 36)
FAINT = (120, 120, 124)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a sheet: images of any sizes, with a name and a note on the left."""

    name: str
    images: Images | Sequence[npt.NDArray[np.uint8]]
    note: str = ""


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font with the letters of many languages; Pillow's own has only English ones."""
    try:
        import matplotlib  # slow to import: only where a sheet is drawn

        font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        return ImageFont.truetype(font, size)
    except (ImportError, OSError):  # not installed, or without its fonts
        return ImageFont.load_default(size)


def contact_sheet(
    rows: Sequence[Row], *, title: str = "", cell: int = 72, captions: Sequence[str] = ()
) -> Image.Image:
    """Draw rows of images with names on the left.

    Args:
        rows: the rows.
        title: text above them.
        cell: larger side of each image, in pixels.
        captions: texts above the columns.
    """
    font, small = _font(14), _font(11)
    columns = max((len(row.images) for row in rows), default=0)
    margin = 16
    names = max(
        (max(font.getlength(row.name), small.getlength(row.note)) for row in rows), default=0
    )
    left = margin + int(names) + 12
    top = margin + (28 if title else 0) + (18 if captions else 0)
    width = max(left + columns * (cell + GAP) + margin, left + int(font.getlength(title)))
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + GAP) + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, INK, _font(17))
    for column, caption in enumerate(captions):
        draw.text((left + column * (cell + GAP), top - 18), caption, FAINT, small)
    for number, row in enumerate(rows):
        y = top + number * (cell + GAP)
        draw.text((margin, y + cell // 2 - (16 if row.note else 8)), row.name, INK, font)
        if row.note:
            draw.text((margin, y + cell // 2 + 2), row.note, FAINT, small)
        for column, image in enumerate(row.images):
            sheet.paste(thumbnail(image, cell), (left + column * (cell + GAP), y))
    return sheet


def thumbnail(image: npt.NDArray[np.uint8], cell: int) -> Image.Image:
    """Return a CHW image with a larger side of `cell` pixels; whole multiples keep its pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    side = max(picture.size)
    method = Image.Resampling.NEAREST if cell % side == 0 else Image.Resampling.LANCZOS
    scale = cell / side
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), method)


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded images: `images[r, i]` is image i of class `classes[r]`."""

    classes: tuple[int, ...]
    images: Images  # (R, I, 3, h, w)


def sample(
    pack: Pack, decoder: Decoder, *, classes: int, images: int, progress: Counter | None = None
) -> Sample:
    """Decode the first images of classes spread evenly over the pack.

    Args:
        pack: the pack.
        decoder: its decoder.
        classes: how many classes, or all if there are fewer.
        images: how many images of each.
        progress: function of (done, total), called after each step of a group.
    """
    rows = min(classes, len(pack.classes))
    chosen = tuple(int(c) for c in np.linspace(0, len(pack.classes) - 1, rows).round())
    columns = min(images, pack.images_per_class)
    pairs = [(c, i) for c in chosen for i in range(columns)]
    with decoder.counted(progress, len(pairs)):
        groups = [group.cpu().numpy() for _, group in decoder.stream(pairs)]
    decoded = np.concatenate(groups)
    return Sample(chosen, decoded.reshape(rows, columns, *decoded.shape[1:]))


def render_sheet(pack: Pack, shown: Sample, *, title: str) -> Image.Image:
    """Return a sample as one picture."""
    rows = [
        Row(pack.classes[c], images) for c, images in zip(shown.classes, shown.images, strict=True)
    ]
    return contact_sheet(rows, title=printable(title))
