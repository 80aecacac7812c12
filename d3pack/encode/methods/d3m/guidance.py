"""How strongly the images follow their prompts, by measurement.

Where a backbone knows a data set well, the most varied images are the best to pick from; where it
does not, only guidance brings out what the prompt has learned. Each weight makes candidates of
every class, the teacher picks among them as it will for the pack, and those nearest to the real
images in its features (energy distance, class by class) decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from d3pack.decode import Decoder
from d3pack.encode.allocation import Allocation
from d3pack.encode.candidates import Answers, candidates_of, lanes_of, pick_order
from d3pack.encode.contract import Draft, EncodeRun
from d3pack.encode.plan import EncodePlan
from d3pack.encode.sampler_fit import fitted_once, fitted_recipe
from d3pack.encode.sampler_search import GUIDANCES, energy_distance, measurable
from d3pack.format import Pack
from d3pack.teachers import batched

KEPT = 5  # images of a class that a trial keeps, and as many more as modes need
MOST_CLASSES = 50  # that a trial makes images of
_NAME = "guidance/{:g}"  # in the journal: the distance at a weight


def trial_images(allocation: Allocation) -> int:
    """Return the images of a class that a trial makes."""
    kept = lanes_of(KEPT, allocation.modes)
    return candidates_of(kept, allocation.modes, allocation.candidates, allocation.share)


def best_guidance(
    run: EncodeRun,
    plan: EncodePlan,
    draft: Draft,
    real: Callable[[int], Tensor],
    *,
    fit: bool,
    last: bool,
) -> Draft:
    """Return the draft with the weight whose picked images lie nearest to the real features.

    Args:
        run: the run.
        plan: its plan.
        draft: a draft with any guidance.
        real: the teacher's features of real images of a class.
        fit: whether a sampler is fitted at each weight.
        last: whether a shard has nothing to do after this.
    """
    count, journal = len(plan.classes), run.journal
    spread = np.linspace(0, count - 1, min(count, MOST_CLASSES)).astype(int)
    features = {int(c): real(int(c)).double() for c in spread if measurable(real(int(c)))}
    if not features:
        run.events.note(f"guidance {draft.recipe.guidance:g}: too few real images to measure by")
        return fitted_once(run, plan, draft, last=last) if fit else draft
    # noise of its own: the images of the pack are not those that chose
    trial = replace(
        draft.pack(plan),
        images_per_class=trial_images(plan.allocation),
        seed=plan.seed ^ 2**63,
    )
    names, stage = [*map(_NAME.format, GUIDANCES)], "choose the guidance"
    done = sum(name in journal for name in names)

    def weighted_by(weight: float) -> Pack:
        pack = replace(trial, recipe=replace(trial.recipe, guidance=weight))
        return replace(pack, recipe=fitted_recipe(run, pack, draft.backbone)) if fit else pack

    with run.events.stage(stage, len(GUIDANCES), "weights", part="guidance"):
        for unit in run.units(stage, names):
            weight = GUIDANCES[unit]
            weighted = weighted_by(weight)
            distance = _distance(weighted, plan.allocation, draft, features)
            journal.record(names[unit], distance)
            done += 1
            run.events.step(done, guidance=weight, distance=distance)
    distances = {weight: journal[name] for weight, name in zip(GUIDANCES, names, strict=True)}
    best = min(GUIDANCES, key=distances.__getitem__)
    measured = ", ".join(f"{weight:g}: {distances[weight]:.3f}" for weight in GUIDANCES)
    run.events.note(f"guidance {best:g}; distance to real images at {measured}")
    return replace(draft, recipe=weighted_by(best).recipe)


def _distance(
    pack: Pack, allocation: Allocation, draft: Draft, features: Mapping[int, Tensor]
) -> float:
    """Mean over these classes, of the images that would be kept."""
    backbone, teacher = draft.backbone, draft.teacher
    assert teacher is not None
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    kept = lanes_of(KEPT, allocation.modes)
    lanes = lanes_of(kept, allocation.modes, allocation.share)
    distances = []
    for c, real in features.items():
        images = decoder.images([(c, i) for i in range(pack.images_per_class)]).cpu()
        logits, unit_features = batched(teacher, images)
        order = pick_order(Answers(logits.numpy(), unit_features.numpy()), c, kept, lanes)
        picked = teacher.features(images[torch.from_numpy(order)]).double()
        distances.append(energy_distance(picked, real))
    return round(float(np.mean(distances)), 6)
