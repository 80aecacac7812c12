"""Prompts that lead in one pass of the model where guidance leads with two.

Guidance moves each answer of the model away from that under no class. Most of this is the same for
all images of a class, so that a prompt can carry it: each is fitted, by least squares, to the
guided answers on the way of images of its own, at the noise levels of the sampler. Images then
take half of the calls; what guidance does to single images alone is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.decode import Decoder, samplers
from d3pack.encode.candidates import stored
from d3pack.encode.contract import Draft, EncodeRun
from d3pack.encode.plan import EncodePlan
from d3pack.encode.vectors import tuned
from d3pack.format import Pack

STATES = 120  # of images on their way, that a prompt is fitted to
ROUNDS = 12  # of L-BFGS
CALLS = 14  # of the loss, about, in so many rounds
_NAME = "one-pass/{:06d}"


@dataclass(frozen=True, slots=True)
class _Level:
    """States at one noise level, and what the model answers with guidance."""

    sigma: float
    x: Tensor
    guided: Tensor
    gap: float  # mean squared, to its answers under the prompt before

    def loss(self, answers: Tensor) -> Tensor:
        return (answers - self.guided).square().mean() / self.gap


def states_of(steps: int) -> int:
    """Return how many images of a class are followed through so many noise levels."""
    return max(2, STATES // steps)


def in_one_pass(run: EncodeRun, plan: EncodePlan, draft: Draft, *, last: bool) -> Draft:
    """Return the draft with prompts fitted to its guidance, and without guidance.

    Args:
        run: the run.
        plan: its plan.
        draft: a draft with guidance.
        last: whether a shard has nothing to do after this.
    """
    assert draft.prompts is not None
    shape = draft.prompts.shape
    modes = shape[1]
    names = [_NAME.format(row) for row in range(shape[0] * modes)]
    pack = draft.pack(plan)
    each = states_of(len(pack.recipe.sigmas) - 1)
    # images of their own noise, of which the first of a class has its first mode
    pack = replace(pack, images_per_class=each * modes, seed=plan.seed ^ 2**61)
    plain = replace(pack, recipe=replace(pack.recipe, guidance=1.0), unconditional=None)
    guided, alone = (
        Decoder(made, device=draft.backbone.device, backbone=draft.backbone)
        for made in (pack, plain)
    )
    stage, done = "fit prompts to one pass", sum(map(run.journal.has, names))
    with run.events.stage(stage, len(names), "prompts", part="one pass", done=done):
        for row in run.units(stage, names, last=last):
            c, mode = divmod(row, modes)
            chosen = [(c, i * modes + mode) for i in range(each)]
            vectors, left = _fitted(guided, alone, draft.prompts[c, mode], chosen)
            run.journal.save(names[row], {"vectors": vectors}, {"left": left})
            done += 1
            run.events.step(done)
    kept = [stored(run.journal, name) for name in names]
    left = float(np.mean([facts["left"] for _, facts in kept]))
    run.events.note(
        f"one pass instead of guidance {draft.recipe.guidance:g}: prompts carry"
        f" {1 - left:.0%} of what it changes"
    )
    prompts = np.stack([arrays["vectors"] for arrays, _ in kept]).reshape(shape)
    return replace(
        draft,
        prompts=prompts,
        unconditional=None,
        recipe=replace(draft.recipe, guidance=1.0),
    )


def _fitted(
    guided: Decoder,
    alone: Decoder,
    vectors: npt.NDArray[np.float32],
    chosen: list[tuple[int, int]],
) -> tuple[npt.NDArray[np.float32], float]:
    """Return the vectors of a prompt, and the share of the gap to guided answers that is left.

    Args:
        guided: makes images with guidance.
        alone: makes them without.
        vectors: of the prompt so far.
        chosen: images of the prompt.
    """
    pack, backbone = guided.pack, guided.backbone
    way = guided.explore(chosen, lambda model, noise: _way(pack, model, noise))
    levels = alone.explore(chosen, lambda model, _: _levels(way, model))
    with tuned(backbone, pack.adapter):

        def answer(vectors: Tensor, level: _Level) -> Tensor:
            condition = backbone.condition(vectors[None], pack.recipe.template)
            return backbone.denoise(level.x, level.sigma, condition.expand(len(chosen)))

        return _descend(torch.from_numpy(vectors).to(backbone.device), levels, answer)


def _way(pack: Pack, model: samplers.Model, noise: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """Return levels, states and guided answers on the way of the sampler."""
    way = []

    def follow(x: Tensor, sigma: float) -> Tensor:
        answers = model(x, sigma)
        way.append((sigma, x, answers))
        return answers

    recipe = pack.recipe
    x = samplers.start(noise, recipe.sigmas)
    samplers.sample(recipe.sampler, follow, x, recipe.sigmas, None, recipe.extra)
    return way


def _levels(way: list[tuple[float, Tensor, Tensor]], model: samplers.Model) -> list[_Level]:
    """Return the way as levels, without levels at which guidance changes nothing."""
    levels = []
    for sigma, x, guided in way:
        gap = float((model(x, sigma) - guided).square().mean())
        if gap > 0.0:
            levels.append(_Level(sigma, x.clone(), guided.clone(), gap))
    return levels


def _descend(
    start: Tensor, levels: list[_Level], answer: Callable[[Tensor, _Level], Tensor]
) -> tuple[npt.NDArray[np.float32], float]:
    """Return the vectors that the levels lead to, by L-BFGS, and their loss."""
    size = start.norm().clamp_min(1e-6)
    change = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change], max_iter=ROUNDS, history_size=ROUNDS, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for level in levels:  # one at a time: all together may not fit into memory
            loss = level.loss(answer(start + change * size, level)) / len(levels)
            loss.backward()
            total += float(loss.detach())
        return total

    if levels:
        optimizer.step(closure)
    with torch.no_grad():
        vectors = start + change * size
        losses = [float(level.loss(answer(vectors, level))) for level in levels]
    return vectors.cpu().numpy(), float(np.mean(losses)) if losses else 0.0
