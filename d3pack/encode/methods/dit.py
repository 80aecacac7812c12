"""What the methods of class-conditional DiTs share: allocation, images and their latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import ImageOps
from torch import Tensor

from d3pack.backbones import DiT
from d3pack.encode.allocation import SHARE, Allocation, allocate
from d3pack.encode.contract import EncodeRun
from d3pack.encode.settings import EncodeSettings
from d3pack.sources import Source
from d3pack.system import throttled
from d3pack.train import Latents, Photos, cached_latents, load_photos

Pixels = npt.NDArray[np.uint8]
Encoder = Callable[[Tensor], Tensor]  # uint8 images -> latents
_NAMED = 6  # classes that a note lists
WORK = "training"  # folder of the journal
IMAGES = "images"  # in the journal: how many could be read


def allocate_rows(
    settings: EncodeSettings, size_of: Callable[[Allocation], int]
) -> tuple[Allocation, tuple[str, ...]]:
    """Return the allocation of a pack whose prompts are rows of a class table, and lines on it."""
    default = Allocation(codec="f16", share=SHARE)
    return allocate(settings, size_of, default=default, own={"modes": 1, "vectors": 1})


def unknown_names_note(backbone: DiT, classes: Sequence[str]) -> tuple[str, ...]:
    """Return a line of the plan on classes that the backbone does not know by name."""
    unknown = backbone.unknown_names(classes)
    if not unknown:
        return ()
    some = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
    return (
        f"{len(unknown)} of {len(classes)} classes are unknown to the backbone by name and start at"
        f" the mean of its class rows: {some}; class_names give it names or numbers of its own",
    )


def encode_images(
    run: EncodeRun, encode: Encoder, side: int, hold_back: int
) -> tuple[Photos, Latents]:
    """Return all images at one size, and the latents of those to train on; both are kept."""
    cache = run.journal.path(WORK) / "cache"
    progress = throttled(lambda done, total: run.events.step(done))
    with run.events.stage("read the images", sum(run.source.counts), "images"):
        if IMAGES not in run.journal:  # files that were left out are not in the journal either
            (cache / "photos.json").unlink(missing_ok=True)
        photos = load_photos(run.source, cache, side, hold_back, progress)
        run.remember_skipped()
        run.journal.record(IMAGES, len(photos.labels))  # a journal without facts has not begun
    with run.events.stage("encode the images", 2 * len(photos.train), "images"):
        latents = cached_latents(photos, of_pixels(encode), cache, 0.0, run.settings.seed, progress)
    return photos, latents


def of_pixels(encode: Encoder) -> Callable[[Pixels], Tensor]:
    """Return an encoder of images as one of (N, S, S, 3) pixels."""

    @torch.no_grad()
    def through(pixels: Pixels) -> Tensor:
        return encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    return through


def spread_images(source: Source, side: int, c: int, most: int) -> Pixels:
    """Return evenly spread images of a class, (N, 3, S, S), as they were trained on."""
    bad = {skip.key for skip in source.skipped if skip.class_name == source.classes[c]}
    good = [i for i, name in enumerate(source.names(c)) if name not in bad]
    picked = np.linspace(0, len(good) - 1, min(most, len(good))).astype(int)
    images = [source.load(c, good[i]) for i in picked]
    pixels = np.stack([np.asarray(ImageOps.fit(image, (side, side))) for image in images])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
