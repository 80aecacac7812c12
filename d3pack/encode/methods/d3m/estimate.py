"""What a plan of D3M will cost on this machine, from a few seconds of the real work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.encode.estimate import seconds_of, teacher_seconds, timings
from d3pack.encode.methods.d3m.guidance import LOOKED, tried
from d3pack.encode.methods.d3m.plan import D3MPlan, make_recipe
from d3pack.encode.options import EncodeOptions
from d3pack.encode.search import GUIDANCES
from d3pack.format.codecs import encode_prompts
from d3pack.format.pack import Pack
from d3pack.sources import Source


def estimate(
    source: Source, plan: D3MPlan, backbone: Backbone, options: EncodeOptions
) -> Mapping[str, Any]:
    """Seconds by stage."""
    classes, dials = len(plan.classes), plan.dials
    rows = classes * dials.modes
    each = max(1, options.batch // min(options.slots, rows))
    read = seconds_of(lambda: [source.get(0, i) for i in range(min(8, source.counts[0]))])
    read /= min(8, source.counts[0])
    looked = sum(min(count, options.pool) for count in source.counts)
    vectors = backbone.name_vectors(plan.classes[0], dials.vectors).float()[None]
    picture = torch.zeros((8, 3, *plan.size), dtype=torch.uint8)
    x = torch.zeros((8, *backbone.latent_shape_for(plan.size)), device=backbone.device)
    t = torch.full((8,), 500, device=backbone.device)

    def fit() -> None:
        leaf = vectors.expand(8, -1, -1).clone().requires_grad_()
        out = backbone.predict(x, t, backbone.condition(leaf, plan.template))
        torch.autograd.grad(out.square().mean(), [leaf])

    with torch.no_grad():
        latents = seconds_of(lambda: backbone.encode(picture)) / 8
    kept = min(options.collages, -(-looked // classes // plan.factor**2)) * classes
    stages = {
        "collages": looked * (read + 2e-4 * plan.crops) + kept * latents,
        # about three quarters of the steps are used before a row stops gaining
        "inversion": rows * each * (0.75 * options.steps + options.cool) * seconds_of(fit) / 8,
    }
    if options.teacher == "train":
        stages["teacher"] = (
            teacher_seconds(source, plan.typical, options, backbone.device)
            + sum(source.counts) * read
        )
    made = (dials.candidates if dials.candidates > 1 else 0) + (dials.labels != "none")
    image = _decode(plan, backbone)
    if plan.guidance is None:
        trial = tried(dials) * min(classes, LOOKED)
        stages["guidance"] = image * trial * len(GUIDANCES)
    stages["images"] = image * plan.images_per_class * classes * made
    return timings(stages)


def _decode(plan: D3MPlan, backbone: Backbone) -> float:
    """Seconds an image."""
    recipe = make_recipe(replace(plan, sampler_steps=2), backbone)
    values = np.zeros((1, 1, 1, plan.width), np.float32)
    pack = Pack(("one",), plan.group, recipe, encode_prompts(values, "f16"), seed=0)
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    two = seconds_of(lambda: decoder.images(range(plan.group))) / plan.group
    return two * plan.sampler_steps / 2
