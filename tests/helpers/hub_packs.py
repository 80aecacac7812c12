"""Small packs with every section, made here."""

from __future__ import annotations

from functools import cache

import numpy as np

from d3pack.format.codecs import encode_adapter, encode_labels, encode_picks, encode_prompts
from d3pack.format.pack import Pack, Probes
from d3pack.format.recipe import BackboneRef, FileLock, Recipe

BACKBONE = BackboneRef(
    "stable-diffusion", "org/tiny", "1" * 40, {"unet/config.json": FileLock(3, "2" * 64)}, "mit"
)
RECIPE = Recipe(BACKBONE, size=(64, 64), sampler="ddim", sigmas=(14.6, 1.0, 0.0))


@cache
def make_pack(
    classes: int = 10, images: int = 6, seed: int = 1, *, full: bool = True, dims: int = 768
) -> Pack:
    """A pack of random prompts; `full` adds soft labels, curated picks, an adapter and probes."""
    rng = np.random.default_rng(seed)
    names = tuple(f"class {i:04d}" for i in range(classes))
    prompts = encode_prompts(rng.standard_normal((classes, 1, 1, dims)).astype(np.float32))
    if not full:
        return Pack(names, images, RECIPE, prompts, seed)
    probs = rng.dirichlet(np.full(classes, 0.1), (classes, images))
    return Pack(
        names,
        images,
        RECIPE,
        prompts,
        seed,
        picks=encode_picks([rng.permutation(4 * images)[:images] for _ in range(classes)]),
        labels=encode_labels(probs, k=10),
        adapter=encode_adapter({"mid.bias": rng.standard_normal(64).astype(np.float32)}),
        probes=Probes(
            rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8), np.array([0, 3]), np.array([0, 1])
        ),
        provenance={"method": "d3m", "source": {"name": "random numbers", "licence": "cc0-1.0"}},
    )
