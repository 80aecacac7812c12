"""Sampler, steps and guidance by measurement: the best images that the time allows.

The paper of the class-conditional method scores images a second as well as students, and does not
say how to choose. Here every sampling of a small grid, among them fitted samplers of few steps
(`sampler_fit.py`) unless sampler or steps are set, makes a few images of each class, and the
teacher compares them with as many real ones. The distance is the energy distance between features,
class by class, so that a wrong class, a blurred one and one image over and over all cost. Among the
samplings that meet the time limit, those within `SLACK` of the nearest are as good as equal, and of
these the one with the fewest forward passes is taken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, Sampling
from d3pack.decode import Decoder
from d3pack.encode.contract import Draft, EncodeRun
from d3pack.encode.plan import EncodePlan, sigmas_of
from d3pack.encode.sampler_fit import STEPS as FITTED_STEPS
from d3pack.encode.sampler_fit import can_fit, fitted_recipe, forwards_of, unfitted
from d3pack.encode.settings import EncodeSettings
from d3pack.errors import UsageError
from d3pack.format import Pack, Recipe, Sampler
from d3pack.system import wait_for_device
from d3pack.teachers import Teacher

STEPS = (4, 6, 8, 12, 18)
GUIDANCES = (1.0, 1.5, 2.5, 4.0)
SLACK = 1.05
_NAME = "sampler {}"  # in the journal: what a sampling came to
_SPEED = "speed"  # in the journal

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Trial:
    """What a sampling came to."""

    sampling: Sampling
    right: float  # share of images that the teacher assigns to their class
    distance: float  # energy distance to real features, mean over classes


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds for one image on this machine, with all its cores at work."""

    forward: float
    rest: float  # noise, autoencoder

    def seconds(self, sampling: Sampling) -> float:
        """Return the seconds that an image takes."""
        return self.rest + self.forward * sampling.forwards


def grid(settings: EncodeSettings, *, fit: bool) -> list[Sampling]:
    """Return the samplings to try; what the user has set stays as it is.

    Args:
        settings: of the run.
        fit: whether samplers can be fitted to the backbone.
    """
    sampler: Sampler = settings.sampler or "dpmpp-2m"
    steps = (settings.sampler_steps,) if settings.sampler_steps else STEPS
    guidances = GUIDANCES if settings.guidance is None else (settings.guidance,)
    kinds = [(sampler, n) for n in steps]
    if fit and settings.sampler is None and settings.sampler_steps is None:
        kinds.append(("table", FITTED_STEPS))
    return [Sampling(sampler, n, g) for sampler, n in kinds for g in guidances]


def searched(images: int, classes: int) -> int:
    """Return how many images judge a setting, of so many that are wanted: four a class at least."""
    return max(4, images // classes) * classes


def fitting(samplings: Sequence[Sampling], shape: tuple[int, ...]) -> float:
    """Return the passes of the model that fitting samplers takes, for latents of a shape."""
    fit = forwards_of(shape, FITTED_STEPS)
    return sum(fit * s.forwards / s.steps for s in samplings if s.sampler == "table")


def with_sampling(recipe: Recipe, backbone: Backbone, sampling: Sampling) -> Recipe:
    """Return the recipe with another sampling."""
    return replace(
        recipe,
        sampler=sampling.sampler,
        sigmas=sigmas_of(backbone, sampling.sampler, sampling.steps, recipe.size),
        guidance=sampling.guidance,
    )


def _recipe_with(run: EncodeRun, pack: Pack, backbone: Backbone, sampling: Sampling) -> Recipe:
    """Return the recipe of a pack with another sampling; the journal keeps fitted samplers."""
    if sampling.sampler != "table":
        return with_sampling(pack.recipe, backbone, sampling)
    recipe = replace(pack.recipe, guidance=sampling.guidance)
    recipe = unfitted(recipe, sampling.steps)
    return fitted_recipe(run, replace(pack, recipe=recipe), backbone)


def choose(trials: Sequence[Trial], speed: Speed, limit: float) -> Trial:
    """Return the nearest that is fast enough, or a cheaper one that is as near.

    Args:
        trials: the samplings and what they came to.
        speed: of this machine.
        limit: seconds for an image; 0 is no limit.

    Raises:
        UsageError: if none is fast enough.
    """
    fast = [t for t in trials if not limit or speed.seconds(t.sampling) <= limit]
    if not fast:
        fastest = min(speed.seconds(t.sampling) for t in trials)
        raise UsageError(
            f"no sampler is fast enough: an image takes {fastest:.4f} s at least, and"
            f" decode_seconds leaves {limit:.4f} s for it",
            hint="allow more seconds or make fewer images",
        )
    # of unbiased estimates the smallest may be negative: slack is measured from above zero
    near = SLACK * max(min(t.distance for t in fast), 0.0) + 1e-4
    good = [t for t in fast if t.distance <= near]
    return min(good, key=lambda t: (t.sampling.forwards, t.distance))


def best_sampling(
    run: EncodeRun,
    plan: EncodePlan,
    draft: Draft,
    *,
    images: int,
    decode_seconds: float,
) -> Draft:
    """Return the draft with the best sampling of the grid; measurements stay in the journal.

    Args:
        run: the run.
        plan: its plan.
        draft: a draft with any sampling, a teacher and real images.
        images: generated images for each sampling, of all classes.
        decode_seconds: time for all images of the pack; 0 is no limit.
    """
    pack, backbone, teacher = draft.pack(plan), draft.backbone, draft.teacher
    assert teacher is not None
    assert draft.real is not None
    journal, samplings = run.journal, grid(run.settings, fit=can_fit(backbone))
    classes = range(len(pack.classes))
    each = searched(images, len(classes)) // len(classes)
    # noise of its own: the images of the pack are not those that chose the sampler
    trial = replace(pack, images_per_class=each, seed=pack.seed + 2**63)
    names, stage = [_NAME.format(sampling) for sampling in samplings], "choose the sampler"
    if run.once(stage, names[-1]):  # by one shard: speeds of two machines do not compare
        if _SPEED not in journal:
            journal.record(_SPEED, _measure_speed(trial, backbone))
        features = [_features(teacher, draft.real(c, 4 * each)) for c in classes]
        with run.events.stage(stage, len(samplings), "settings", part="sampler"):
            for done, (name, sampling) in enumerate(zip(names, samplings, strict=True), 1):
                if name not in journal:
                    one = replace(trial, recipe=_recipe_with(run, trial, backbone, sampling))
                    journal.record(name, _try(one, backbone, teacher, features))
                run.events.step(done, **journal[name])
    speed = Speed(**journal[_SPEED])
    trials = [Trial(s, **journal[name]) for s, name in zip(samplings, names, strict=True)]
    best = choose(trials, speed, decode_seconds / len(pack) if decode_seconds else 0.0)
    run.events.note(
        f"sampler: {best.sampling}: {100 * best.right:.1f} % right, distance {best.distance:.4f}, "
        f"{1 / speed.seconds(best.sampling):.1f} images/s here"
    )
    return replace(
        draft,
        recipe=_recipe_with(run, pack, backbone, best.sampling),
        metrics={**draft.metrics, "right": best.right, "distance": best.distance},
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| in units of the last, without bias."""

    def inner(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    across = torch.cdist(a, b).mean()
    own = inner(b)
    return float((2 * across - inner(a) - own) / own)


def measurable(features: Tensor) -> bool:
    """Return whether a distance to these images exists: two of them must differ."""
    return bool((features != features[0]).any())


def _features(teacher: Teacher, images: Images) -> Tensor:
    return teacher.features(torch.from_numpy(images)).double()


def _try(
    pack: Pack, backbone: Backbone, teacher: Teacher, real: Sequence[Tensor]
) -> Mapping[str, float]:
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    images = decoder.images(range(len(pack))).cpu()
    answers = teacher.logits(images).argmax(1).reshape(len(pack.classes), -1)
    right = answers == torch.arange(len(pack.classes))[:, None]
    features = teacher.features(images).double().reshape(len(pack.classes), len(answers[0]), -1)
    pairs = [(f, r) for f, r in zip(features, real, strict=True) if measurable(r)]
    distances = [energy_distance(f, r) for f, r in pairs] or [0.0]
    return {
        "right": round(float(right.double().mean()), 4),
        "distance": round(float(np.mean(distances)), 6),
    }


def _measure_speed(pack: Pack, backbone: Backbone) -> Mapping[str, float]:
    """Time two step counts without guidance: the slope is a forward pass, what is left the rest."""

    def seconds(steps: int) -> float:
        recipe = with_sampling(pack.recipe, backbone, Sampling("ddim", steps, 1.0))
        one = replace(pack, recipe=recipe)
        decoder = Decoder(one, device=backbone.device, backbone=backbone)
        # a CPU has a group on every core, an accelerator one at a time
        on_cpu = backbone.device.type == "cpu"
        many = decoder.group * (2 * torch.get_num_threads() if on_cpu else 1)
        numbers = [i % len(one) for i in range(many)]
        decoder.images(numbers[: decoder.group])
        wait_for_device()
        began = time.perf_counter()
        decoder.images(numbers)
        wait_for_device()
        return (time.perf_counter() - began) / many

    few, more = seconds(2), seconds(10)
    forward = max((more - few) / 8, 1e-9)
    return {"forward": forward, "rest": max(few - 2 * forward, 1e-9)}
