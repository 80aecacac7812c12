"""Write `vectors.json`: what d3pack computes, which the viewer must compute too, to the bit.

python viewer/tests/make_vectors.py      # a test fails while the file and d3pack differ
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import d3pack
from d3pack.backbones import open_backbone
from d3pack.decode import noise, samplers
from d3pack.decode.codes import chosen_noise
from d3pack.format import Pack, coding_of, decode_labels, decode_prompts, decode_weights
from d3pack.format.codecs import codes_at

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "spec" / "vectors" / "valid"
SHAPE = (4, 5, 3)  # of latents: not a whole number of blocks
SIGMAS = (14.6146, 6.25, 2.0, 0.5, 0.0)
EXTRAS: dict[str, dict[str, Any]] = {
    "ancestral": {"eta": 0.7},
    "table": {
        "table": [[0.5, [0.5]], [0.25, [1, -0.25]], [0, [1.5, -0.5]], [0.5, [0.5, 0.1, -0.1]]]
    },
}
TEXTS = (
    "",
    "a photo of a {}",
    "A  Photo\tof the 25th's caf\u00e9, \u4e2d\u6587 & it'll <|endoftext|> do!",
    "zebra-fish under\u00e5lder \U0001f600 naive\u0308",
)


def bits(values: Any) -> str:
    """Return the SHA-256 of values as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


def noises() -> list[dict[str, Any]]:
    """Return noise of some counters."""
    counters = (
        (0, 0, 0, 0),
        (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        (0x0123456789ABCDEF, noise.draw_number(3, 7), 999, 65535),
    )
    rows = []
    for seed, draw, c, j in counters:
        values = noise.normal(seed, c, j, SHAPE, draw)
        row = {"seed": f"{seed:016x}", "draw": draw, "class": c, "image": j}
        rows.append({**row, "first": values.ravel()[:4].tolist(), "sha256": bits(values)})
    return rows


def samples() -> dict[str, Any]:
    """Return each sampler's result with the model x0 = x * 0.75 - sigma * 0.125."""
    rows = {}
    for name in ("ddim", "euler", "dpmpp-2m", "lcm", "ancestral", "table"):
        extra = EXTRAS.get(name, {})

        def draw(step: int) -> torch.Tensor:
            return noise.normal_torch(5, [1, 2], [3, 4], SHAPE, step)

        def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return x * 0.75 - torch.tensor(sigma * 0.125, dtype=torch.float32)

        x = samplers.sample(name, model, samplers.start(draw(0), SIGMAS), SIGMAS, draw, extra)
        rows[name] = {"extra": extra, "first": x.flatten()[:4].tolist(), "sha256": bits(x)}
    return rows


def content(pack: Pack) -> dict[str, Any]:
    """Return what the sections of a pack of the corpus mean."""
    count, images = len(pack.classes), pack.images_per_class
    pairs = [(c, j) for c in range(count) for j in range(images)]
    words, candidates = pack.counters(*np.array(pairs).T)
    row: dict[str, Any] = {
        "ledger": dict(sorted(pack.ledger().sections.items())),
        "words": list(zip(words.tolist(), candidates.tolist(), strict=True)),
        "modes": pack.modes(np.arange(images)).tolist(),
    }
    for name in ("prompts", "unconditional"):
        coded = getattr(pack, name)
        if coded is not None:
            row[name] = bits(decode_prompts(coded))
    if pack.labels is not None:
        row["labels"] = bits(np.stack([decode_labels(pack.labels, c) for c in range(count)]))
    if pack.weights is not None:
        row["weights"] = bits(decode_weights(pack.weights))
    if pack.codes is not None:
        row["codes"] = coded_noise(pack)
    return row


def coded_noise(pack: Pack) -> list[str]:
    """Return the noise of every level of the last code of the last class."""
    assert pack.codes is not None
    coding, last = coding_of(pack.codes), pack.codes.params["codes"] - 1
    atoms, signs = codes_at(pack.codes, np.array([len(pack.classes) - 1]), np.array([last]))
    return [
        bits(chosen_noise(pack.seed, coding, level, atoms, signs, SHAPE, "cpu")) if m else ""
        for level, m in enumerate(coding.atoms)
    ]


def mini() -> dict[str, Any]:
    """Return what `mini` reads of texts, and its levels."""
    backbone: Any = open_backbone("mini")
    x, out = (torch.from_numpy(noise.normal(1, 0, i, SHAPE)) for i in (0, 1))
    levels, sigmas = backbone.levels, (14.6146, 14.0, 3.21, 0.0292, 0.001, 1e6)
    return {
        "levels": [
            {
                "sigma": s,
                "timestep": levels.timestep(s),
                "input": bits(levels.scaled(x, s)),
                "x0": bits(levels.denoised(x, s, out)),
            }
            for s in sigmas
        ],
        "prediction": levels.prediction,
        "sigmas": levels.sigmas.tolist(),
        "texts": {text: backbone.text.words.ids(text) for text in TEXTS},
    }


def vectors() -> dict[str, Any]:
    """Return all vectors."""
    paths = sorted(CORPUS.glob("*.d3m"))
    return {
        "content": {path.stem: content(d3pack.read(path)) for path in paths},
        "mini": mini(),
        "noise": noises(),
        "samplers": samples(),
        "shape": SHAPE,
        "sigmas": SIGMAS,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("vectors.json")
    target.write_text(json.dumps(vectors(), sort_keys=True, indent=1) + "\n", encoding="utf-8")
