"""How near codes come to their photographs, and how fast they are made and decoded.

    python -m benchmarks codes photos/ --side 32 --images 6
    python -m benchmarks codes photos/ --more

For several sizes of codes, images of every class are coded for `mini` and decoded again, with class
names as prompts. PSNR is measured at `--side`, where the photographs are of that size. Then the
bytes are counted that differ over batch sizes, orders, threads and processes (0 where decoding is
exact). `--more` measures others: the codes that `d3pack code` makes of a number of bytes, without
prompts, as images of `mini`'s size and of half of it, and the eight choices of the default.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_backbones
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import decode
from benchmarks.results import RESULTS, command, save
from d3pack.backbones import Backbone, open_backbone
from d3pack.decode import Decoder
from d3pack.encode import EncodeSettings, coding_within
from d3pack.encode.codes import Coder
from d3pack.encode.methods.codes.method import images_of
from d3pack.encode.plan import coding_for
from d3pack.format import Codes, Coding, Pack, Recipe, encode_codes, encode_prompts, write
from d3pack.sources import open_source

WHAT = "PSNR and speed of codes by their size"
# levels, bits, atoms; and how many choices are tried at each level
SIZES = ((15, 8, 1), (15, 12, 1), (30, 8, 1), (15, 8, 2), (15, 8, 4))
TRIED = (1, 4)
SHORT = 60  # bytes up to which the eight choices of the default are tried
BYTES = (17, 25, 32, 60, 120, 250, 500, 1000)  # of an image


def psnr(made: Tensor, real: Tensor, side: int) -> float:
    """Return the mean PSNR of uint8 images, made smaller to `side`."""

    def small(images: Tensor) -> Tensor:
        values = images.float() / 255
        return functional.interpolate(values, size=(side, side), mode="bilinear", antialias=True)

    errors = (small(made) - small(real)).square().mean((1, 2, 3)).clamp(min=1e-6)
    return float(-10 * torch.log10(errors).mean())


def measure(
    backbone: Backbone, names: Sequence[str], photos: list[Tensor], coding: Coding, tried: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return the decoded images of all classes, and images a second of both ways."""
    vectors = [backbone.name_vectors(name, 1).detach().float().numpy() for name in names]
    height, width = photos[0].shape[2:]
    recipe = Recipe(backbone.ref, (height, width), "euler", (1.0, 0.0))
    pack = Pack(tuple(names), 1, recipe, encode_prompts(np.stack(vectors)[:, None]), seed=0)
    count = len(photos[0])
    began = time.perf_counter()
    codes = []
    for c, images in enumerate(photos):
        with torch.no_grad():
            latents = backbone.encode(images).float()
        codes.append(Coder(backbone, coding, pack, c, tried).code(latents))
    encoded = time.perf_counter() - began
    atoms, signs = (np.stack([code[i] for code in codes]) for i in (0, 1))
    section = encode_codes(Codes(coding, count, atoms.astype(np.int64), signs))
    whole = Pack(tuple(names), count, recipe, pack.prompts, seed=0, codes=section)
    decoder = Decoder(whole, backbone=backbone)
    decoder.images(range(min(len(whole), 16)))  # kernels are compiled
    began = time.perf_counter()
    made = decoder.images(range(len(whole)))
    decoded = time.perf_counter() - began
    total = len(whole)
    return made, {
        "size": [height, width],
        "bytes": section.nbytes / total,
        "encoded_per_second": round(total / encoded, 1),
        "decoded_per_second": round(total / decoded, 1),
    }


def equality() -> dict[str, Any]:
    """Differing bytes of a pack on `mini` whose classes begin with images of codes.

    Six of the eight images that are asked for come from four codes, so that two have fresh noise.
    """
    rng = np.random.default_rng(7)
    coding = Coding((8.0, 4.0, 2.0, 1.0, 0.0), (1, 2, 1, 0), bits=8)
    draws = [np.sort(rng.choice(256, 2, replace=False)) for _ in range(40)]
    pairs, singles = np.stack(draws).reshape(10, 4, 2), rng.integers(0, 256, (10, 4, 2))
    atoms = np.concatenate([singles[..., :1], pairs, singles[..., 1:]], -1)
    signs = rng.choice([-1, 1], atoms.shape).astype(np.int8)
    seeded = tiny_backbones.tiny_pack("mini", classes=10, images=1000, steps=4, group=4)
    pack = replace(seeded, codes=encode_codes(Codes(coding, 6, atoms, signs)))
    with tempfile.TemporaryDirectory() as folder:
        write(pack, Path(folder) / "codes.d3m")
        return decode.compared("mini", Path(folder) / "codes.d3m")


@dataclass(frozen=True)
class Run:
    """Codes to be measured."""

    settings: EncodeSettings
    tried: int
    half: bool = False  # images of half of the size of the backbone's
    prompts: bool = True


def runs(more: bool) -> Iterator[Run]:
    """Yield what is measured."""
    for steps, bits, atoms in () if more else SIZES:
        for tried in TRIED:
            yield Run(settings_of(steps, bits, atoms), tried)
    for nbytes in BYTES if more else ():
        for half in (False, True):
            for tried in (1, 8) if nbytes <= SHORT else (1,):
                yield Run(settings_of(*coding_within(nbytes)), tried, half, prompts=False)


def settings_of(steps: int, bits: int, atoms: int) -> EncodeSettings:
    """Return settings of codes."""
    return EncodeSettings(codes=1, code_steps=steps, code_bits=bits, code_atoms=atoms)


def main(arguments: list[str]) -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=6, help="of each class")
    parser.add_argument("--more", action="store_true", help="other codes, into codes_more.json")
    options = parser.parse_args(arguments)
    backbone = open_backbone("mini", device="cpu")
    source = open_source(options.source)

    def photos_of(size: tuple[int, int]) -> list[Tensor]:
        return [images_of(source, c, size, options.images) for c in range(len(source.classes))]

    photos = photos_of(backbone.image_size)
    height, width = backbone.image_size
    halves = photos_of((height // 2, width // 2))
    with torch.no_grad():
        plain = torch.cat([backbone.decode(backbone.encode(part)) for part in photos])
    real = torch.cat(photos)
    figures: dict[str, Any] = {
        "images": len(real),
        "autoencoder_psnr": round(psnr(plain, real, options.side), 2),
        "load_average": os.getloadavg()[0],
        "codes": [],
    }
    for run in runs(options.more):
        coding = replace(coding_for(run.settings), prompts=run.prompts)
        made, row = measure(
            backbone, source.classes, halves if run.half else photos, coding, run.tried
        )
        size = {"levels": len(coding.atoms), "bits": coding.bits, "atoms": coding.atoms[0]}
        row = {**size, "tried": run.tried, **row}
        row["psnr"] = round(psnr(made, real, options.side), 2)
        figures["codes"].append(row)
        print(row, flush=True)
    if not options.more:
        figures["equality"] = equality()
        print(figures["equality"]["differing_bytes"], "bytes differ", flush=True)
    name = "codes_more.json" if options.more else "codes.json"
    save(RESULTS / name, WHAT, command("codes", arguments), figures)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
