"""How strongly the images follow their prompts, by measurement.

Where a backbone knows a target well, the most varied images are the best to pick from; where it
does not, only guidance brings out what the prompt has learned. Each weight makes candidates of
every class, the teacher picks among them as it will for the pack, and those nearest to the real
images in its features (energy distance, class by class) decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.encode.generate import Judged
from d3pack.encode.method import Run
from d3pack.encode.plan import Dials
from d3pack.encode.search import GUIDANCES, differ, energy_distance
from d3pack.encode.seeds import candidates_of, choose_order, lanes_of
from d3pack.format.pack import Pack
from d3pack.teachers import Teacher, batched

KEPT = 5  # images of a class that a trial keeps, and as many more as modes need
LOOKED = 50  # classes, at most, that it makes them of
_NAME = "guidance"


def tried(dials: Dials) -> int:
    """Images of a class that a trial makes."""
    kept = lanes_of(KEPT, dials.modes)
    return candidates_of(kept, dials.modes, dials.candidates, dials.share)


def best_guided(
    run: Run,
    pack: Pack,
    dials: Dials,
    backbone: Backbone,
    teacher: Teacher,
    real: Callable[[int], Tensor],
) -> Pack:
    """The pack with the weight whose picked images lie nearest to the real features."""
    every = range(len(pack.classes))
    spread = every if len(every) <= LOOKED else np.linspace(0, len(every) - 1, LOOKED).astype(int)
    looked = [c for c in map(int, spread) if differ(real(c))]
    if not looked:
        run.events.note(f"guidance {pack.recipe.guidance:g}: too few real images to measure by")
        return pack
    # noise of its own: the images of the pack are not those that chose
    trial = replace(pack, images_per_class=tried(dials), seed=pack.seed ^ 2**63)
    found: dict[str, Any] = dict(run.journal[_NAME]) if _NAME in run.journal else {}
    with run.events.stage("choose the guidance", len(GUIDANCES), "weights"):
        for done, weight in enumerate(GUIDANCES, 1):
            if str(weight) not in found:
                one = replace(trial, recipe=replace(trial.recipe, guidance=weight))
                found[str(weight)] = _distance(one, looked, dials, backbone, teacher, real)
                run.journal.record(_NAME, found)
            run.events.step(done, guidance=weight, distance=found[str(weight)])
    best = min(GUIDANCES, key=lambda weight: found[str(weight)])
    told = ", ".join(f"{weight:g}: {found[str(weight)]:.3f}" for weight in GUIDANCES)
    run.events.note(f"guidance {best:g}; distance to real images at {told}")
    return replace(pack, recipe=replace(pack.recipe, guidance=best))


def _distance(
    pack: Pack,
    looked: Sequence[int],
    dials: Dials,
    backbone: Backbone,
    teacher: Teacher,
    real: Callable[[int], Tensor],
) -> float:
    """Mean over these classes, of the images that would be kept."""
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    kept = lanes_of(KEPT, dials.modes)
    lanes = lanes_of(kept, dials.modes, dials.share)
    distances = []
    for c in looked:
        images = decoder.images([(c, i) for i in range(pack.images_per_class)]).cpu()
        logits, features = batched(teacher, images)
        judged = Judged(logits.numpy(), features.numpy())
        order = torch.from_numpy(choose_order(judged, c, kept, lanes))
        made = teacher.features(images[order]).double()
        distances.append(energy_distance(made, real(c).double()))
    return round(float(np.mean(distances)), 6)
