"""Contact sheets: rows of small images with a name beside each, by NumPy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Images = npt.NDArray[np.uint8]  # (N, 3, h, w)

GAP = 4
PAPER = (250, 249, 247)
INK = (32, 33, 36)
FAINT = (120, 120, 124)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a sheet."""

    name: str
    images: Images | Sequence[npt.NDArray[np.uint8]]  # of any sizes
    note: str = ""


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with the letters of many languages; Pillow's own has those of English alone."""
    try:
        import matplotlib  # slow to import: only where a sheet is drawn

        font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        return ImageFont.truetype(font, size)
    except (ImportError, OSError):  # not installed, or without its fonts
        return ImageFont.load_default(size)


def contact_sheet(
    rows: Sequence[Row], *, title: str = "", cell: int = 72, captions: Sequence[str] = ()
) -> Image.Image:
    """Draw rows of images, each `cell` pixels high, with names on the left.

    `captions` stand above the columns when given.
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
    """One CHW image at `cell` pixels: whole-number enlargement keeps pixels honest."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    side = max(picture.size)
    how = Image.Resampling.NEAREST if cell % side == 0 else Image.Resampling.LANCZOS
    scale = cell / side
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
