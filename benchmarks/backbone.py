"""How good a backbone is, on real images that its training never saw.

    python -m benchmarks classifier SOURCE CACHE CLASSIFIER      # once
    python -m benchmarks backbone --source SOURCE --cache CACHE --classifier CLASSIFIER \\
        [--backbone mini] [-o RESULTS.json]

SOURCE (or $D3PACK_DATA) holds the training classes; the last 20 images of each were held back.
Images are generated from class names alone, by the project's own samplers, as packs are decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.classifier import Classifier, classify, load_classifier, real_photos
from benchmarks.results import RESULTS, command, load, save
from d3pack.backbones import open_backbone
from d3pack.backbones.protocol import TEMPLATE, Backbone, Condition
from d3pack.backbones.stable_diffusion import StableDiffusion
from d3pack.decode.noise import normal_torch
from d3pack.decode.samplers import sample, schedule, start
from d3pack.preview import Row, contact_sheet
from d3pack.train.data import Photos

WHAT = (__doc__ or "").partition("\n")[0]

GROUP = 32


def generate(
    backbone: StableDiffusion, names: list[str], each: int, steps: int, guidance: float
) -> Iterator[Tensor]:
    """uint8 groups, class by class: `each` images of every name, DPM-Solver++(2M)."""
    sigmas = schedule(backbone.levels.alphas_cumprod, "dpmpp-2m", steps)
    nothing = backbone.unconditional()
    pairs = [(c, i) for c in range(len(names)) for i in range(each)]
    with torch.no_grad():
        said = [backbone.sentence(TEMPLATE.format(name)) for name in names]
        for at in range(0, len(pairs), GROUP):
            part = pairs[at : at + GROUP]
            wanted = Condition.cat([said[c] for c, _ in part])
            both = Condition.cat([nothing.expand(len(part)), wanted])
            classes, images = np.asarray(part).T

            def model(x: Tensor, sigma: float, both: Condition = both) -> Tensor:
                plain, prompted = backbone.denoise(torch.cat([x, x]), sigma, both).chunk(2)
                return plain + guidance * (prompted - plain)

            noise = normal_torch(0, classes, images, backbone.latent_shape, device="cpu")
            yield backbone.decode(sample("dpmpp-2m", model, start(noise, sigmas), sigmas))


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def ranks(logits: Tensor, labels: NDArray[np.int64]) -> dict[str, float]:
    hits = logits.topk(5).indices == torch.from_numpy(labels)[:, None]
    return {"top1": float(hits[:, 0].float().mean()), "top5": float(hits.any(1).float().mean())}


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of features, each taken as Gaussian."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # the trace of the square root of a product is the sum of the roots of its eigenvalues
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real.clip(0))
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(apart + np.trace(cov_x + cov_y) - 2 * roots.sum())


def diversity(features: Tensor, labels: NDArray[np.int64]) -> float:
    """The mean distance of two images of one class."""
    means = []
    for c in np.unique(labels):
        mine = features[torch.from_numpy(labels == c)]
        means.append(float(torch.pdist(mine).mean()))
    return float(np.mean(means))


def autoencoder_psnr(backbone: Backbone, pixels: NDArray[np.uint8]) -> tuple[float, Tensor]:
    """(mean PSNR of the images, all latents)."""
    found, latents = [], []
    with torch.no_grad():
        for at in range(0, len(pixels), 256):
            real = torch.from_numpy(pixels[at : at + 256]).permute(0, 3, 1, 2)
            latents.append(backbone.encode(real))
            made = backbone.decode(latents[-1])
            error = (made.float() - real.float()).square().mean((1, 2, 3)).clamp(min=1e-3)
            found.append(10 * torch.log10(255**2 / error))
    return float(torch.cat(found).mean()), torch.cat(latents)


def speed(
    backbone: StableDiffusion, names: list[str], steps: int, guidance: float
) -> dict[str, Any]:
    """Images a second, autoencoder included: by the clock, and by the processors' own time.

    On a machine that is busy with other work the second figure is the one to trust.
    """
    groups = generate(backbone, names[:8], 4 * GROUP // 8 + 4, steps, guidance)
    next(groups)
    began, worked, made = time.monotonic(), time.process_time(), 0
    for images in groups:
        made += len(images)
    return {
        "images_per_s": made / (time.monotonic() - began),
        "images_per_core_second": made / (time.process_time() - worked),
        "threads": torch.get_num_threads(),
        "steps": steps,
    }


def write_sheet(names: list[str], made: NDArray[np.uint8], each: int, path: Path) -> None:
    """Up to ten images of every eighth class."""
    images = made.reshape(len(names), each, *made.shape[1:]).transpose(0, 1, 4, 2, 3)
    rows = [Row(names[c], images[c, :10]) for c in range(0, len(names), 8)]
    contact_sheet(rows, title="from class names alone", cell=64).save(path)


@dataclass(frozen=True, slots=True)
class Real:
    """What does not depend on the images that a backbone makes."""

    labels: NDArray[np.int64]
    features: Tensor
    scores: dict[str, float]
    against_itself: float  # Frechet distance of as many training images
    against_constant: float  # of the image of the mean latent, again and again
    psnr: float


def measure_real(backbone: Backbone, photos: Photos, classifier: Classifier) -> Real:
    pixels, labels = photos.pixels[photos.held_out], photos.labels[photos.held_out]
    psnr, latents = autoencoder_psnr(backbone, pixels)
    features, logits = classify(classifier, pixels)
    rng = np.random.Generator(np.random.Philox(0))
    others, _ = classify(
        classifier, photos.pixels[rng.choice(photos.train, len(pixels), replace=False)]
    )
    mean_image = to_pixels(backbone.decode(latents.mean(0, keepdim=True)))
    constant, _ = classify(classifier, mean_image)
    return Real(
        labels,
        features,
        ranks(logits, labels),
        frechet(others, features),
        frechet(constant.expand(2, -1), features),
        psnr,
    )


def measure(
    backbone: StableDiffusion,
    names: list[str],
    classifier: Classifier,
    real: Real,
    each: int,
    steps: int,
    scale: float,
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    made = np.concatenate([to_pixels(g) for g in generate(backbone, names, each, steps, scale)])
    labels = np.repeat(np.arange(len(names)), each)
    features, logits = classify(classifier, made)
    scores, distance = ranks(logits, labels), frechet(features, real.features)
    return {
        "classifier_on_generated": scores,
        "recognised_share": {key: scores[key] / real.scores[key] for key in scores},
        "frechet": distance,
        "frechet_share": distance / real.against_constant,
        "diversity": diversity(features, labels),
        "per_class": each,
        "steps": steps,
        "guidance": scale,
    }, made


def curve(path: Path, points: int = 100) -> list[dict[str, float]]:
    """A training curve of `d3pack train`, thinned out; of repeated steps the later one counts."""
    entries: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry or entry.get("final"):
            entries[entry["step"]] = entry
    every = max(1, len(entries) // points)
    last = max(entries)
    keep = ("step", "samples", "seconds", "loss", "samples_per_s", "held_loss", "psnr")
    return [
        {key: entry[key] for key in keep if key in entry}
        for i, (step, entry) in enumerate(sorted(entries.items()))
        if i % every == 0 or step == last or "held_loss" in entry or "psnr" in entry
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=os.environ.get("D3PACK_DATA"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5])
    parser.add_argument("--training", type=Path, help="the run's folder: adds its curves")
    parser.add_argument("--previous", type=Path, help="an earlier result, to stand beside this one")
    parser.add_argument("--sheet", type=Path, help="write generated images of 25 classes (PNG)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "backbone.json")
    found = parser.parse_args(arguments)
    if not found.source:
        parser.error("name the real images with --source or $D3PACK_DATA")
    photos = real_photos(found.source, found.cache)
    classifier = load_classifier(found.classifier, len(photos.names))
    backbone = open_backbone(found.backbone)
    assert isinstance(backbone, StableDiffusion)  # others have no sentences
    names = list(photos.names)
    real = measure_real(backbone, photos, classifier)
    result: dict[str, Any] = {
        "revision": backbone.ref.revision,
        "weights_bytes": backbone.ref.nbytes,
        "decode": speed(backbone, names, found.steps, found.guidance[0]),
        "autoencoder_psnr": real.psnr,
        "real": {
            "judge": real.scores,
            "frechet": real.against_itself,
            "frechet_of_constant": real.against_constant,
            "diversity": diversity(real.features, real.labels),
        },
        "by_guidance": [],
    }
    for guidance in found.guidance:
        entry, made = measure(
            backbone, names, classifier, real, found.per_class, found.steps, guidance
        )
        result["by_guidance"].append(entry)
        print(json.dumps(entry), flush=True)
        if found.sheet:
            write_sheet(names, made, found.per_class, found.sheet)
    if found.training:
        result["curves"] = {
            stage: curve(found.training / stage / "curve.jsonl")
            for stage in ("autoencoder", "text", "diffusion")
        }
    if found.previous:
        before = load(found.previous)
        result["previous"] = {k: v for k, v in before.items() if k not in ("curves", "previous")}
    save(found.output, WHAT, command("backbone", arguments), result)
