"""From the bytes of a file to an RGB image, or to an error that says why not."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from d3pack.errors import SourceError
from d3pack.system import first_line

MAX_PIXELS = 64_000_000
FLAT_PIXELS = 4_000_000  # an image of more is refused where few bytes promise them
MAX_FLAT = 10_000  # pixels of a byte; blank paper as PNG has some hundreds
MAX_BYTES = 256 * 1024 * 1024
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
# formats of photographs; a damaged or hostile file never reaches Pillow's other decoders
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class BadImageError(SourceError):
    """One image of the source cannot be used."""

    code = "E_SOURCE_IMAGE"


def decode(data: bytes) -> Image.Image:
    """Return the RGB image of a file: first frame, upright, 8 bits, transparency on white.

    Raises:
        BadImageError: the file is too large, damaged, or not an image.
    """
    if len(data) > MAX_BYTES:
        raise BadImageError(f"file of {len(data)} bytes is over the limit of {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, damage by the decoder
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImageError(
                        f"{width}x{height} is over the limit of {MAX_PIXELS} pixels"
                    )
                if width * height > max(FLAT_PIXELS, MAX_FLAT * len(data)):
                    raise BadImageError(f"{len(data)} bytes that promise {width}x{height} pixels")
                image.seek(0)
                image.load()
                return _rgb(ImageOps.exif_transpose(image), image.format)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"over the limit of {MAX_PIXELS} pixels") from error
    # Pillow's decoders raise nearly any type for damaged bytes
    except Exception as error:
        reason = first_line(error)
        if "BytesIO" in reason:
            reason = "not an image in a known format"
        raise BadImageError(reason) from error


def _rgb(image: Image.Image, form: str | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # a TIFF of 32 bits has no known scale; all others, also PGM in Pillow, have 16
        return _from_wide(image, form == "TIFF" and image.mode in {"I", "F"}).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _from_wide(image: Image.Image, guess: bool) -> Image.Image:
    """Return an 8-bit image of 16- or 32-bit greys, which Pillow itself would clip to white.

    With `guess`, values up to 255 are taken as 8 bits; on a scale of 16 they would be black.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadImageError("holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0.0 and high <= 1.0:
        top = 1.0
    elif guess and low >= 0.0 and high <= 255.0:
        top = 255.0
    elif low >= 0.0 and high <= 65535.0:
        top = 65535.0
    else:
        raise BadImageError(f"grey values from {low:g} to {high:g} have no known scale")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
