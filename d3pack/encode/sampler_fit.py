"""A sampler of few steps, fitted to where many steps of the same model lead.

A step of a multistep sampler is a weighted sum of the state and of the model's last answers.
DPM-Solver++ and its like derive the weights from the noise levels, which holds for small steps.
Here they are found by least squares: images of the pack's own prompts, of another seed, are made by
many small steps, and each large step is weighted so that it lands, from where the large steps
before it have led, as near as it can to where the small steps were at that level. Nothing is
trained; the weights travel in the recipe as the sampler `table`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from d3pack.backbones import PREDICTIONS, Backbone
from d3pack.decode import Decoder, samplers
from d3pack.encode.contract import Draft, EncodeRun
from d3pack.encode.plan import EncodePlan, rounded
from d3pack.errors import BackboneError
from d3pack.format import MAX_ORDER, Pack, Recipe

STEPS = 5
VALUES = 32_768  # of latents that weights are fitted to: as many equations, a handful of unknowns
LEAST, MOST = 8, 48  # images
SMALL_STEPS = 4  # in place of each large one
LAST = 1.25  # the last level, times the steps, for latents of about unit variance
_END = 0.02  # the last level of the small steps, or half of the last one of the large steps
_CURVE = 7.0  # of the levels between first and last, as in EDM (arXiv 2206.00364)
_DIGITS = 3  # of a weight, after the point: what is rounded off, later steps make up for

Row = tuple[float, tuple[float, ...]]  # of the state, and of the answers, newest first


def can_fit(backbone: Backbone) -> bool:
    """Return whether a backbone is a diffusion model of many steps, for which a fit pays.

    Flow models and those that were distilled have few steps of their own.
    """
    return getattr(backbone, "sampling", None) is None and backbone.levels.prediction in PREDICTIONS


@dataclass(frozen=True, slots=True)
class SamplerFit:
    """A fitted sampler, and what it misses of where small steps lead.

    Attributes:
        sigmas: levels, and a final 0.
        table: weights of each step.
        error: mean squared distance of latents, as a share of their variance.
    """

    sigmas: tuple[float, ...]
    table: tuple[Row, ...]
    error: float


def unfitted(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with a sampler that is to be fitted: of the size that it will have."""
    sigmas = levels(recipe.sigmas[0], steps)
    table = []
    for i, (high, low) in enumerate(pairwise(sigmas)):
        orders = min(i + 1, MAX_ORDER)
        kept = round(low / high, _DIGITS)
        table.append([kept, [round(1 - kept, _DIGITS), *[-0.001, 0.001, -0.001][: orders - 1]]])
    return with_table(recipe, sigmas, table)


def levels(first: float, steps: int) -> tuple[float, ...]:
    """Return so many descending noise levels, denser towards the last, and a final 0."""
    ends = first ** (1 / _CURVE), (LAST / steps) ** (1 / _CURVE)
    between = [ends[0] + i / max(steps - 1, 1) * (ends[1] - ends[0]) for i in range(steps)]
    return rounded((*(root**_CURVE for root in between), 0.0), digits=4)


def fitted_once(
    run: EncodeRun, plan: EncodePlan, draft: Draft, *, last: bool, name: str = ""
) -> Draft:
    """Return the draft with a fitted sampler; one shard fits it.

    Args:
        run: the run.
        plan: its plan.
        draft: prompts and guidance.
        last: whether other shards have nothing to do after this.
        name: where the journal keeps it, if not by the guidance alone.
    """
    name, stage = name or name_of(draft.recipe), "fit the sampler"
    if run.once(stage, name, last=last):
        with run.events.stage(stage, 1, "samplers", part="sampler"):
            fitted_recipe(run, draft.pack(plan), draft.backbone, name)
            run.events.step(1)
    recipe = fitted_recipe(run, draft.pack(plan), draft.backbone, name)
    error = run.journal[name]["error"]
    run.events.note(f"sampler of {len(recipe.sigmas) - 1} steps, fitted to within {error:.2%}")
    return replace(draft, recipe=recipe)


def fitted_recipe(run: EncodeRun, pack: Pack, backbone: Backbone, name: str = "") -> Recipe:
    """Return the recipe of a pack with a sampler fitted to its prompts at its guidance.

    The journal keeps it, under that name; the number of steps stays.
    """
    recipe, name = pack.recipe, name or name_of(pack.recipe)
    if name not in run.journal:
        fit = fit_sampler(pack, backbone, len(recipe.sigmas) - 1)
        table = [[a, list(b)] for a, b in fit.table]
        record = {"sigmas": list(fit.sigmas), "table": table, "error": round(fit.error, 6)}
        run.journal.record(name, record)
    kept = run.journal[name]
    return with_table(recipe, kept["sigmas"], kept["table"])


def name_of(recipe: Recipe) -> str:
    """Return where the journal keeps the sampler for the guidance of a recipe."""
    return f"sampler/{recipe.guidance:g}"


def with_table(recipe: Recipe, sigmas: Sequence[float], table: Sequence[Any]) -> Recipe:
    """Return the recipe with a sampler of these levels and weights."""
    return replace(recipe, sampler="table", sigmas=tuple(sigmas), extra={"table": table})


def images_for(latent: Sequence[int]) -> int:
    """Return how many images of latents of this shape a sampler is fitted to."""
    return min(max(VALUES // math.prod(latent), LEAST), MOST)


def forwards_of(latent: Sequence[int], steps: int) -> int:
    """Return the model calls of a fit, one image each, without guidance."""
    return (SMALL_STEPS * steps + 1 + steps) * images_for(latent)


def fit_sampler(pack: Pack, backbone: Backbone, steps: int) -> SamplerFit:
    """Return the sampler of so many steps that comes nearest to many small ones.

    Args:
        pack: prompts and guidance, and the highest noise level; the rest of its sampler is not
            used, nor its seed.
        backbone: that of the pack.
        steps: model calls of an image, twice as many with guidance.
    """
    classes = len(pack.classes)
    images = images_for(backbone.latent_shape_for(pack.recipe.size))
    pack = replace(pack, images_per_class=-(-images // classes), seed=pack.seed ^ 2**62)
    # where there are more classes than images, some from all over the list
    numbers = [i * max(classes, images) // images for i in range(images)]
    chosen = [(number % classes, number // classes) for number in numbers]
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    sigmas = levels(pack.recipe.sigmas[0], steps)
    return decoder.explore(chosen, lambda model, noise: _fit(model, noise, sigmas))


def _fit(model: samplers.Model, noise: Tensor, sigmas: Sequence[float]) -> SamplerFit:
    aims = _small_steps(model, noise, sigmas)
    if not torch.isfinite(aims[-1].sum()):
        raise BackboneError(
            "the backbone made latents that are not finite",
            code="E_BACKBONE_NOT_FINITE",
            hint="its precision is too low for it, or the prompts have diverged",
        )
    x, table = aims[0], []
    answers: list[Tensor] = []
    for sigma, aim in zip(sigmas, aims[1:], strict=False):
        answers = [model(x, sigma), *answers][:MAX_ORDER]
        terms = [x, *answers]
        weights = _least_squares(terms, aim)
        table.append((weights[0], tuple(weights[1:])))
        x = _sum(weights, terms)
    error = float((x - aims[-1]).square().mean() / aims[-1].var())
    return SamplerFit(tuple(sigmas), tuple(table), error)


def _sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([term * weight for term, weight in zip(terms, weights, strict=False)]).sum(0)


def _least_squares(terms: Sequence[Tensor], aim: Tensor) -> list[float]:
    # on the CPU: elsewhere there is no double precision (MPS), or terms must not be alike (CUDA)
    columns = torch.stack([term.flatten().cpu() for term in terms], dim=1).double()
    solution = torch.linalg.lstsq(columns, aim.flatten().cpu().double()[:, None]).solution[:, 0]
    return [round(weight, _DIGITS) for weight in solution.tolist()]


def _small_steps(model: samplers.Model, noise: Tensor, sigmas: Sequence[float]) -> list[Tensor]:
    """Return the states at these levels on the way by DPM-Solver++(2M) in small steps."""
    end = min(_END, sigmas[-2] / 2)
    fine = [
        high * (max(low, end) / high) ** (part / SMALL_STEPS)
        for high, low in pairwise(sigmas)
        for part in range(SMALL_STEPS)
    ]
    states: list[Tensor] = []
    x = samplers.start(noise, sigmas)
    answers: list[Tensor] = []
    for i, (sigma, step) in enumerate(
        zip([*fine, end], samplers.plan("dpmpp-2m", [*fine, end, 0.0]), strict=True)
    ):
        if i % SMALL_STEPS == 0 and len(states) < len(sigmas) - 1:
            states.append(x)
        answers = [model(x, sigma), *answers][:2]
        x = _sum((step.a, *step.b), [x, *answers])
    return [*states, x]
