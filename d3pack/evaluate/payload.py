"""Payloads: how many photographs fit into so many bytes, the baseline that a pack has to beat.

Two layouts. `files`: one file per image, as datasets are usually sent. `sheet`: all images as tiles
of one picture, whose tables and headers are paid once; nobody sends a dataset so, but it holds far
more images in as many bytes. Labels cost nothing in either: the order of the images tells them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d3pack.evaluate.entries import PayloadFormat, PayloadSettings
from d3pack.students import HELD_BACK, LabelledImages, RealImages, fit, held_back

# trains a student on the first, briefly or to the end, and returns the accuracy on the second
Pilot = Callable[[LabelledImages, LabelledImages, bool], float]
# chooses so many images of each class, without so many of the first of each
Choose = Callable[[int, Sequence[int]], list[Tensor]]
_LEFT = 3  # a third of the settings has pilots of full length, after a short one each
_WIDEST = 8192  # pixels of a sheet's side: WebP and Pillow's guard against bombs both allow it
_SMALLEST = {"files": 40, "sheet": 8}  # bytes that every image takes at least


@dataclass(frozen=True, slots=True)
class Tuned:
    """What pilots chose; no settings where not even one image fits into the budget."""

    settings: PayloadSettings | None
    score: float  # accuracy of its pilot of full length
    scores: Mapping[str, float]  # of all settings, of the longest pilot of each


def candidates(format: PayloadFormat, size: int) -> list[PayloadSettings]:
    """Return the settings to try: three qualities at each of four sides, to a quarter of it."""
    sides = {max(8, size * quarters // 4 // 8 * 8) for quarters in (1, 2, 3)} - {size}
    return [
        PayloadSettings(format, quality, side)
        for side in (size, *sorted(sides))
        for quality in format.qualities
    ]


def pilots_of(settings: int) -> tuple[int, int]:
    """Return how many pilots choose among so many settings: short ones, and of full length."""
    return settings, -(-settings // _LEFT)


def _save(picture: Image.Image, settings: PayloadSettings) -> bytes:
    results = []
    for arguments in settings.format.encoders:
        buffer = io.BytesIO()
        picture.save(buffer, settings.format.codec, quality=settings.quality, **arguments)
        results.append(buffer.getvalue())
    return min(results, key=len)


def pack_tiles(images: Tensor, settings: PayloadSettings) -> bytes:
    """Return all images (N, 3, S, S) as one picture."""
    tiles = fit(images, settings.side).permute(0, 2, 3, 1).numpy()
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    side = settings.side
    sheet = np.zeros((rows * columns, side, side, 3), dtype=np.uint8)
    sheet[: len(tiles)] = tiles
    sheet[len(tiles) :] = tiles[-1]  # a repeated tile costs least
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return _save(Image.fromarray(sheet.reshape(rows * side, columns * side, 3)), settings)


def unpack_tiles(data: bytes, count: int, side: int) -> Tensor:
    """Return the tiles as they come out of the file, uint8 (N, 3, side, side)."""
    with Image.open(io.BytesIO(data)) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    flat = tiles.reshape(rows * columns, side, side, 3)[:count].transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(flat))


def as_files(images: Tensor, settings: PayloadSettings) -> Iterator[bytes]:
    """Yield each image (N, 3, S, S) as a file of its own."""
    for image in images:
        tile = fit(image[None], settings.side)[0].permute(1, 2, 0).numpy()
        yield _save(Image.fromarray(tile), settings)


def file_bytes(images: Tensor, settings: PayloadSettings) -> float:
    """Return the mean size of one image in a file of its own."""
    return float(np.mean([len(data) for data in as_files(images, settings)]))


def largest(
    classes: Sequence[Tensor], settings: PayloadSettings, budget: int
) -> LabelledImages | None:
    """Return the first images of all classes, in turn, that fit into so many bytes.

    They are coded and decoded again, as a student gets them. None where not even one fits.
    """
    depth = max(len(images) for images in classes)
    turns = [(c, i) for i in range(depth) for c in range(len(classes)) if i < len(classes[c])]
    images = torch.stack([classes[c][i] for c, i in turns])
    labels = torch.tensor([c for c, _ in turns])
    first = _first_files if settings.format.layout == "files" else _first_tiles
    tiles, nbytes = first(images, settings, budget)
    if len(tiles) == 0:
        return None
    note = f"{len(tiles)} images, {settings}"
    return LabelledImages(tiles, labels[: len(tiles)], nbytes, note)


def _first_files(images: Tensor, settings: PayloadSettings, budget: int) -> tuple[Tensor, int]:
    kept, nbytes = [], 0
    for data in as_files(images, settings):
        if nbytes + len(data) > budget:
            break
        nbytes += len(data)
        kept.append(unpack_tiles(data, 1, settings.side)[0])
    return (torch.stack(kept) if kept else images[:0]), nbytes


def _first_tiles(images: Tensor, settings: PayloadSettings, budget: int) -> tuple[Tensor, int]:
    low, high, best = 0, min(len(images), (_WIDEST // settings.side) ** 2) + 1, b""
    guess = 1
    while high - low > 1:
        data = pack_tiles(images[:guess], settings)
        if len(data) <= budget:
            low, best = guess, data
        else:
            high = guess
        # Sizes grow almost in proportion: aim there, within what is left.
        guess = min(max(round(guess * budget / len(data)), low + 1), high - 1)
    return (unpack_tiles(best, low, settings.side) if low else images[:0]), len(best)


def most_per_class(counts: Sequence[int], budget: int, format: PayloadFormat) -> int:
    """Return more images of a class than can fit; large classes fill up what small ones lack."""
    left = budget // _SMALLEST[format.layout]
    ascending = sorted(counts)
    for place, count in enumerate(ascending):
        share = left // (len(ascending) - place) + 1
        if count >= share:
            return share
        left -= count
    return ascending[-1]


def fill(classes: list[Tensor], settings: PayloadSettings, budget: int) -> LabelledImages:
    """Return the payload of a budget; a single image where even the first one is larger than it.

    Settings are chosen with other images, which may have been a little smaller.
    """
    payload = largest(classes, settings, budget)
    if payload is None:
        payload = largest([images[:1] for images in classes[:1]], settings, 1 << 40)
    assert payload is not None
    return payload


def choose_settings(
    real: RealImages,
    budget: int,
    format: PayloadFormat,
    pilot: Pilot,
    note: Callable[[str], None],
    choose: Choose | None = None,
) -> Tuned:
    """Return the settings whose images teach pilots best.

    Every setting has a short pilot, the best third one of full length: short ones favour images
    from which little can be learned, but soon. They are judged on real training images that the
    payload does not contain.

    Args:
        choose: chooses the images of the payload; None: they are drawn at random.
    """
    limit = most_per_class(real.counts, budget, format)
    drawn = real.by_class(limit + HELD_BACK, 0)
    held = [  # of the readable ones that were drawn
        min(held_back(count), len(images) - 1)
        for count, images in zip(real.counts, drawn, strict=True)
    ]
    if any(held):
        test = LabelledImages.of([images[:n] for images, n in zip(drawn, held, strict=True)])
        classes = [images[n : n + limit] for images, n in zip(drawn, held, strict=True)]
    else:  # one image of each class: there are no others to judge on
        test, classes = LabelledImages.of(drawn), drawn
    if choose is not None:
        classes = choose(limit, held)
    tried = [(s, largest(classes, s, budget)) for s in candidates(format, real.size)]
    payloads = {settings: payload for settings, payload in tried if payload is not None}
    marks: dict[PayloadSettings, float] = {}
    running = list(payloads)
    for whole, kind in ((False, "pilot"), (True, "pilot of full length")):
        for settings in running:
            accuracy = round(pilot(payloads[settings], test, whole), 4)
            marks[settings] = accuracy
            note(f"{kind}: {payloads[settings].note}, {100 * accuracy:.1f} %")
        if not whole:
            running.sort(key=lambda settings: -marks[settings])
            running = running[: pilots_of(len(payloads))[1]]
    best = max(running, key=lambda settings: marks[settings], default=None)
    scores = {payloads[settings].note: mark for settings, mark in marks.items()}
    return Tuned(best, marks[best] if best else 0.0, scores)
