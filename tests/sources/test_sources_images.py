"""Images of every sort become the same RGB pixels; bad bytes are named."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_world import pixels, png

from d3pack.sources import BadImageError
from d3pack.sources import images as images_module
from d3pack.sources.images import decode


def grey_ramp() -> np.ndarray:
    return np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_sixteen_bit_grey_keeps_its_range() -> None:
    image = decode(saved(Image.fromarray(grey_ramp()), "PNG"))
    assert image.mode == "RGB"
    expected = np.rint(grey_ramp() / 257.0).astype(np.uint8)
    assert np.array_equal(np.asarray(image)[..., 0], expected)


def test_sixteen_bit_tiff_keeps_its_range() -> None:
    found = np.asarray(decode(saved(Image.fromarray(grey_ramp()), "TIFF")))
    assert found.max() == 251
    assert found.min() == 0


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize(("top", "scale"), [(1, 1.0), (255, 1.0), (65535, 1 / 257)])
def test_32_bit_tiff_keeps_its_scale(kind: type, top: int, scale: float) -> None:
    values: Any = np.linspace(0, top, 64).reshape(8, 8).astype(kind)
    found = np.asarray(decode(saved(Image.fromarray(values), "TIFF")))[..., 0]
    if kind is np.float32 and top == 1:
        scale = 255.0  # only fractions have a scale that ends at one
    assert np.array_equal(found, np.rint(values * scale).astype(np.uint8))


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_values_without_a_known_scale_are_refused(value: int) -> None:
    values = np.full((8, 8), value, np.int32)
    with pytest.raises(BadImageError, match="have no known scale"):
        decode(saved(Image.fromarray(values), "TIFF"))


def test_dark_16_bit_image_stays_dark() -> None:
    for data in (
        saved(Image.fromarray(np.full((8, 8), 200, np.uint16)), "PNG"),
        saved(Image.fromarray(np.full((8, 8), 200, np.uint16)), "TIFF"),
        b"P5 2 2 65535\n" + b"\0\xc8" * 4,
    ):
        assert np.asarray(decode(data)).max() == 1


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    found = np.asarray(decode(saved(red.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(found - [250, 10, 10]).max() < 12


def test_grey_and_palette_become_rgb() -> None:
    grey = Image.fromarray(pixels(0, 0)[..., 0])
    assert np.array_equal(np.asarray(decode(saved(grey, "PNG")))[..., 1], np.asarray(grey))
    assert decode(saved(Image.fromarray(pixels(0, 0)).quantize(16), "PNG")).mode == "RGB"


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.asarray(decode(saved(clear, "PNG"))).min() == 255


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.new("RGB", (4, 8)), "JPEG", exif=exif)).size == (8, 4)


def huge_png(width: int, height: int) -> bytes:
    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    start = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(start) + chunk(b"IDAT" + zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png(pixels(0, 0))[:-80], "."),
        (huge_png(100_000, 100_000), "over the limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
    ids=["empty", "text", "truncated", "bomb", "postscript"],
)
def test_bad_bytes_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_file_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_BYTES", 10)
    with pytest.raises(BadImageError, match="over the limit of 10"):
        decode(png(pixels(0, 0)))


def test_few_bytes_that_promise_many_pixels_are_refused() -> None:
    """A fuzzer found a TIFF of 386 bytes that took ten seconds; blank paper is still an image."""
    bomb = saved(Image.new("1", (7000, 7000)), "TIFF", compression="group4")
    assert len(bomb) < 4900
    with pytest.raises(BadImageError, match="promise 7000x7000 pixels"):
        decode(bomb)
    assert decode(saved(Image.new("L", (2500, 2000), 255), "PNG")).size == (2500, 2000)
