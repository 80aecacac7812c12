"""Picks of whole sets: of the images of a class, made several times, one set is kept.

`s3` is Selective Subgroup Sampling of IMS3 (arXiv 2603.13960): the sets whose mean features are
near to those of the real images of their class and far from those of the other classes. `draws` is
the choice of D3HR (arXiv 2505.18399): the set of noises whose statistics are nearest to those of
the normal distribution that they are drawn from, for which no image has to be made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from d3pack.backbones import Backbone
from d3pack.decode import noise
from d3pack.encode.allocation import Allocation
from d3pack.encode.candidates import make_images, stored_arrays
from d3pack.encode.contract import EncodeRun
from d3pack.encode.plan import EncodePlan
from d3pack.encode.real import fitted_images
from d3pack.format import Pack, encode_sets
from d3pack.sources import random_order
from d3pack.system import seconds_of
from d3pack.teachers import Teacher

REAL = 200  # real images of a class that make its centroid, as in IMS3's code
NEAR, APART = 0.4, 0.9  # alpha and beta of IMS3
SWEEPS = 5
_LEAST = 1e-6  # distance, below which two centroids are one
_SKEW = 0.1  # weight of skewness in D3HR's code
_VALUES = 1 << 22  # of noise that are drawn at a time


def with_sets(
    run: EncodeRun,
    plan: EncodePlan,
    pack: Pack,
    backbone: Backbone,
    teacher: Callable[[], Teacher],
    *,
    last: bool,
) -> Pack:
    """Return the pack with the best set of each class picked.

    Args:
        last: whether a shard has nothing to do after this.
    """
    allocation, count = plan.allocation, pack.images_per_class
    stride = stride_of(count, allocation)
    if allocation.select == "draws":
        sets = _best_draws(run, pack, backbone, stride, allocation.candidates, last=last)
    else:
        sets = _separate_sets(run, plan, pack, backbone, teacher(), stride, last=last)
    return replace(pack, picks=encode_sets(sets, count, stride))


def stride_of(count: int, allocation: Allocation) -> int:
    """Return the candidates of a set: so many images, and as many for each mode."""
    return -(-count // allocation.modes) * allocation.modes


def draw_seconds(plan: EncodePlan, shape: tuple[int, ...]) -> dict[str, float]:
    """Return the seconds that the choice among draws takes on this machine, if there is one."""
    allocation = plan.allocation
    if allocation.select != "draws" or allocation.candidates == 1 or not plan.seeded:
        return {}
    stride = stride_of(plan.seeded, allocation)
    few = np.arange(min(8, allocation.candidates))
    each = seconds_of(lambda: _off(plan.seed, 0, few, plan.seeded, stride, shape, "cpu")) / len(few)
    return {"draws": each * allocation.candidates * len(plan.classes)}


def _best_draws(
    run: EncodeRun, pack: Pack, backbone: Backbone, stride: int, count: int, *, last: bool
) -> npt.NDArray[np.int64]:
    """Return the set of noises of each class that is nearest to normal."""
    images, shape = pack.images_per_class, backbone.latent_shape_for(pack.recipe.size)
    names = [f"sets/{images}-{count}/{c:06d}" for c in range(len(pack.classes))]
    step = max(1, _VALUES // (images * math.prod(shape)))
    done = sum(map(run.journal.has, names))
    with run.events.stage("choose among draws", len(names), "classes"):
        for c in run.units("choose among draws", names, last=last):
            parts = [
                _off(pack.seed, c, numbers, images, stride, shape, backbone.device)
                for numbers in np.split(np.arange(count), range(step, count, step))
            ]
            best = int(torch.cat(parts).argmin())
            run.journal.save(names[c], {"set": np.array([best])}, {})
            done += 1
            run.events.step(done)
    return np.concatenate([stored_arrays(run.journal, name)["set"] for name in names])


def _off(
    seed: int,
    c: int,
    numbers: npt.NDArray[np.int64],
    images: int,
    stride: int,
    shape: tuple[int, ...],
    device: torch.device | str,
) -> Tensor:
    """Return how far each set of noises is from normal."""
    columns = (numbers[:, None] * stride + np.arange(images)).ravel()
    drawn = noise.normal_torch(seed, np.full_like(columns, c), columns, shape, 0, device)
    return off_normal(drawn.reshape(len(numbers), images, -1))


def off_normal(sets: Tensor) -> Tensor:
    """Return how far sets (N, images, D) are from normal, by D3HR's score.

    It adds the lengths of the errors of mean and deviation of each value over the images, and a
    tenth of that of the skewness of each image, of its values in units of these means and
    deviations. Of one image, which has no deviation, the mean alone counts.
    """
    mean, values = sets.mean(1, keepdim=True), sets.shape[2]
    off: Tensor = mean.norm(dim=(1, 2))
    if sets.shape[1] == 1:
        return off
    deviation = sets.std(1, keepdim=True)
    z = (sets - mean) / deviation
    skew = z.pow(3).sum(2) * (values / ((values - 1) * (values - 2)))
    off += (deviation - 1).norm(dim=(1, 2)) + _SKEW * skew.norm(dim=1)
    return off


def _separate_sets(
    run: EncodeRun,
    plan: EncodePlan,
    pack: Pack,
    backbone: Backbone,
    teacher: Teacher,
    stride: int,
    *,
    last: bool,
) -> npt.NDArray[np.int64]:
    """Return the set of each class that S3 chooses."""
    sets, images = plan.allocation.candidates, pack.images_per_class
    real = [f"sets/real/{c:06d}" for c in range(len(pack.classes))]
    mine = [c for c in range(len(real)) if run.owns(c) and not run.journal.has(real[c])]
    with run.events.stage("look at real images", len(mine), "classes"):
        for done, c in enumerate(mine, 1):
            numbers = random_order(run.source.counts[c], plan.seed, c)[:REAL]
            batches = fitted_images(run.source, c, numbers, plan.size)
            seen = torch.cat([_unit_features(teacher, batch) for batch in batches])
            run.remember_skipped()
            run.journal.save(real[c], {"centroid": centroids(seen[None]).numpy()}, {})
            run.events.step(done)

    def look(made: Tensor) -> dict[str, npt.NDArray[np.float32]]:
        features = _unit_features(teacher, made).reshape(sets, stride, -1)
        return {"centroids": centroids(features[:, :images]).numpy()}

    many = replace(pack, images_per_class=sets * stride)
    names = make_images(run, many, backbone, f"candidates/sets-{sets}-{images}", look, last=last)
    made = np.stack([stored_arrays(run.journal, name)["centroids"] for name in names])
    wanted = np.concatenate([stored_arrays(run.journal, name)["centroid"] for name in real])
    return separate_sets(torch.from_numpy(made), torch.from_numpy(wanted)).numpy()


def _unit_features(teacher: Teacher, images: Tensor) -> Tensor:
    parts = [teacher.features(part) for part in images.split(128)]
    return functional.normalize(torch.cat(parts), dim=1)


def centroids(features: Tensor) -> Tensor:
    """Return the mean direction (N, F) of sets of unit features (N, images, F)."""
    return functional.normalize(features.mean(1), dim=1)


def separate_sets(made: Tensor, real: Tensor) -> Tensor:
    """Return the set of each class that is near to its real images and far from other sets.

    Class after class takes the set that is best with those that the other classes have, from the
    sets nearest to the real images on, until none changes. The objective is that of IMS3, with
    cosine distances d: `NEAR * sum -log d(set, real) + APART * sum over pairs log d(set, set')`.

    Args:
        made: centroids (C, G, F) of the sets of each class.
        real: those of their real images (C, F).
    """
    made, real = made.double(), real.double()
    near = -_log_distance(torch.einsum("cgf,cf->cg", made, real))
    chosen = near.argmax(1)
    classes = torch.arange(len(made))
    for _ in range(SWEEPS):
        before = chosen.clone()
        for c in range(len(made)):
            others = made[classes, chosen][classes != c]
            apart = _log_distance(made[c] @ others.T).sum(1)
            chosen[c] = (NEAR * near[c] + APART * apart).argmax()
        if torch.equal(before, chosen):
            break
    return chosen


def _log_distance(cosines: Tensor) -> Tensor:
    return (1 - cosines).clamp(min=_LEAST).log()
