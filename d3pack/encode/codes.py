"""Photographs as codes: at every level, the noise that leads most towards the photograph.

After arXiv 2502.01189: sampling runs as it will in the decoder, and where the decoder would take
fresh noise, the encoder takes the entries of the codebook that correlate best with what the current
estimate lacks. The code is the numbers and signs of those entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, Condition
from d3pack.decode import codebook, samplers, unconditional
from d3pack.encode.candidates import stored_arrays
from d3pack.encode.contract import EncodeRun
from d3pack.encode.plan import EncodePlan, coding_for
from d3pack.encode.settings import EncodeSettings
from d3pack.encode.vectors import tuned
from d3pack.errors import UsageError
from d3pack.format import (
    Codes,
    Coding,
    Pack,
    Recipe,
    decode_prompts,
    encode_codes,
    encode_prompts,
)
from d3pack.sources import Source, random_order
from d3pack.students import held_back
from d3pack.system import seconds_of
from d3pack.teachers import Cut, Teacher, batched, best_patches

Array = npt.NDArray[Any]
BATCH = 64  # images that are coded at the same time
POOL = 1000  # photographs of a class that are looked at, at least
_LOOKED = 4  # for each one that is coded
_COVERED = 2000  # photographs from which those to be coded are chosen so that they cover them
_SAMPLE = 16  # images that are coded for an estimate
_TIMED = 3  # levels of them: each of the others takes as long
_TRIALS = 8192  # images times choices at each level, about, where nobody says how many
_TRIED = 8  # and the most choices
_SMALL_LATENTS = 4096  # values: where a pass of the backbone is cheap
_PIXELS = 1 << 17  # that the autoencoder encodes at a time: 32 images of 64x64
_VALUES = 1 << 18  # of latents that one forward pass takes: 16 of 4x64x64
_KEPT = 1 << 22  # values of a codebook that is worth keeping
_PART = 1 << 24  # and of a part of a codebook that is in memory as a whole: 64 MB
_PROMPT_SHARE = 0.1  # of the bytes of codes are saved where they have learned prompts: 0.2 dB
_NEAR = 4  # entries that are in the running for each atom, where a codebook is larger


def with_codes(
    run: EncodeRun,
    plan: EncodePlan,
    pack: Pack,
    backbone: Backbone,
    latents: Callable[[int], Tensor],
    *,
    last: bool = False,
) -> Pack:
    """Return the pack with codes in front of the images of every class.

    Args:
        latents: those of a class to be coded.
        last: whether a shard has nothing to do after this.
    """
    count, total = plan.codes, len(pack.classes) * plan.codes
    coding = plan.coding
    assert coding is not None
    check_can_code(backbone, coding)
    tried = tried_of(run.settings, plan, backbone.latent_shape_for(plan.size))
    names = [f"{_name(coding, plan.size, tried)}/{c:06d}" for c in range(len(pack.classes))]

    def stored(c: int) -> tuple[Array, Array] | None:
        kept = run.journal.load(names[c])
        return None if kept is None else (kept[0]["atoms"], kept[0]["signs"])

    def length(kept: tuple[Array, Array] | None) -> int:
        return 0 if kept is None else min(count, len(kept[0]))

    def is_done(c: int) -> bool:
        return length(stored(c)) == count

    done = sum(length(stored(c)) for c in range(len(names)))
    with run.events.stage("code photographs", total, "images", part="codes", done=done):
        for c in run.units("code photographs", names, done=is_done, last=last):
            wanted = latents(c)
            run.remember_skipped()
            coder = Coder(backbone, coding, pack, c, tried)
            before = stored(c)
            done -= length(before)
            with tuned(backbone, pack.adapter):
                for atoms, signs in coder.batches(wanted, before):
                    run.journal.save(names[c], {"atoms": atoms, "signs": signs}, {})
                    run.events.step(done + len(atoms), samples=done + len(atoms))
            done += count
    rows = [stored_arrays(run.journal, name) for name in names]
    atoms, signs = (np.stack([row[key][:count] for row in rows]) for key in ("atoms", "signs"))
    codes = encode_codes(Codes(coding, count, atoms.astype(np.int64), signs))
    prompts = pack.prompts if plan.needs_prompts else None
    return replace(pack, images_per_class=plan.images_per_class, prompts=prompts, codes=codes)


def latents_of(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the latents of images (N, 3, H, W)."""
    step = max(1, _PIXELS // math.prod(images.shape[2:]))
    with torch.no_grad():
        return torch.cat([backbone.encode(part).float() for part in images.split(step)])


def can_code(backbone: Backbone, coding: Coding) -> bool:
    """Return whether the backbone was trained on the noise levels of codes."""
    table = backbone.levels.sigmas
    return bool(table[0] <= coding.sigmas[-2] < coding.sigmas[0] <= table[-1])


def check_can_code(backbone: Backbone, coding: Coding) -> None:
    """Refuse codes of noise levels on which the backbone was not trained.

    Raises:
        UsageError: it was not.
    """
    if not can_code(backbone, coding):
        raise UsageError("the backbone was not trained on the noise levels of codes")


def tried_of(settings: EncodeSettings, plan: EncodePlan, shape: tuple[int, ...]) -> int:
    """Return how many choices are tried at each level, for latents of a shape.

    By default more where there are fewer images, and the same for all splits of a budget, whose
    codes may be used again.
    """
    if settings.code_tried is not None:
        return settings.code_tried
    if math.prod(shape) > _SMALL_LATENTS:
        return 1
    coding, codes = plan.coding or coding_for(settings), plan.codes * len(plan.classes)
    if plan.pilots:
        codes = int((settings.budget or 0) / coding_for(settings).nbytes)
    tried = min(_TRIED, _TRIALS // max(codes, 1), coding.entries)
    return 1 << max(0, tried.bit_length() - 1)


def _name(coding: Coding, size: tuple[int, int], tried: int) -> str:
    """Where the journal keeps codes: those of a pilot are the first of those of another."""
    bare = "" if coding.prompts else "-bare"
    of = f"{size[0]}x{size[1]}-{len(coding.atoms)}-{coding.bits}-{max(coding.atoms)}-{tried}"
    return f"codes/{of}{bare}"


def coding_alone(plan: EncodePlan, size_of: Callable[[EncodePlan], int]) -> Coding:
    """Return how codes are made where no image has a seed: without prompts that cost too much."""
    coding = plan.coding
    assert coding is not None
    bare = replace(coding, prompts=False)
    prompts = size_of(plan) - size_of(replace(plan, coding=bare))
    codes = coding.nbytes * plan.codes * len(plan.classes)
    return bare if prompts > codes * _PROMPT_SHARE else coding


def divided(source: Source, plan: EncodePlan, c: int) -> tuple[list[int], list[int]]:
    """Return the photographs of a class that may be coded, and those that pilots are tested on."""
    order = random_order(source.counts[c], plan.seed, c)
    free = len(order) - (held_back(len(order)) if plan.pilots else 0)
    return order[:free], order[free:]


def choose_photographs(run: EncodeRun, plan: EncodePlan, teacher: Teacher, c: int) -> Tensor:
    """Return photographs that cover the half of a class that the teacher finds more typical.

    The first k of them cover it best with k; where the half has more than 2,000, they are its most
    typical ones. A class with too few photographs repeats them.
    """
    cut = Cut(size=plan.size, pool=max(POOL, _LOOKED * plan.codes), seed=plan.seed)
    free, _ = divided(run.source, plan, c)
    patches = best_patches(run.source, c, teacher, cut, free)
    order = np.argsort(patches.costs, kind="stable")
    pixels = torch.from_numpy(patches.pixels[order[: max(plan.codes, -(-len(order) // 2))]])
    if len(pixels) <= _COVERED:
        pixels = pixels[covering(batched(teacher, pixels)[1], plan.codes)]
    return pixels[np.resize(np.arange(len(pixels)), plan.codes)]


def covering(features: Tensor, count: int) -> Tensor:
    """Return `count` rows at most, by which all rows are covered best.

    Each is the one that raises the sum of similarities to the nearest chosen row most (greedy
    facility location).

    Args:
        features: unit vectors (N, F).
    """
    similar = features @ features.T
    nearest = torch.full((len(features),), -1.0)
    chosen: list[int] = []
    for _ in range(min(count, len(features))):
        gains = (similar - nearest[:, None]).clamp_(min=0).sum(0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        nearest = torch.maximum(nearest, similar[:, chosen[-1]])
    return torch.tensor(chosen)


def code_seconds(
    backbone: Backbone, plan: EncodePlan, recipe: Recipe, settings: EncodeSettings
) -> float:
    """Return the seconds that this machine takes to code one image of a plan."""
    coding = plan.coding or coding_for(settings)
    tried = tried_of(settings, plan, backbone.latent_shape_for(plan.size))
    least, _, width = backbone.output_shape
    prompt = (1, backbone.prompt_shape[1]) if recipe.template is not None else (least, width)
    names = torch.zeros(1, 1, *prompt).numpy()
    pack = Pack(("one",), 1, recipe, encode_prompts(names, "f16"), seed=0)
    shape = (_SAMPLE, *backbone.latent_shape_for(recipe.size))
    latents = torch.zeros(shape, device=backbone.device)
    levels = len(coding.atoms)
    timed = min(_TIMED, levels)
    few = replace(coding, sigmas=(*coding.sigmas[:timed], 0.0), atoms=coding.atoms[:timed])
    coder = Coder(backbone, few, pack, 0, tried)
    seconds = seconds_of(lambda: coder.code(latents), enough=1.0) / _SAMPLE
    if tried > 1:
        return seconds * levels / timed
    # the last level needs no pass of the backbone, see `Coder`
    one = seconds_of(lambda: coder.look(latents), enough=1.0) / _SAMPLE
    choice = max(0.0, seconds - (timed - 1) * one) / timed
    return levels * choice + (levels - 1) * one


@dataclass(frozen=True, slots=True)
class Coder:
    """Codes the latents of a class."""

    backbone: Backbone
    coding: Coding
    pack: Pack  # its prompts and its seed
    c: int  # the class
    tried: int = 1  # choices of each level that are tried on the backbone

    def code(self, latents: Tensor) -> tuple[Array, Array]:
        """Return atoms and signs (N, atoms of all levels) of latents (N, C, H, W)."""
        *_, last = self.batches(latents)
        return last

    def batches(
        self, latents: Tensor, before: tuple[Array, Array] | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Yield atoms and signs of all latents so far, after each batch.

        Args:
            latents: (N, C, H, W).
            before: what an earlier run has coded of them, of which whole batches are taken.
        """
        begun = 0 if before is None else min(len(before[0]), len(latents)) // BATCH * BATCH
        parts = [] if before is None else [(before[0][:begun], before[1][:begun])]
        for at in range(begun, len(latents), BATCH):
            parts.append(self._code(latents[at : at + BATCH], at))
            atoms, signs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            yield atoms.astype(np.int32), signs.astype(np.int8)

    @torch.inference_mode()
    def look(self, latents: Tensor) -> Tensor:
        """Return what the backbone sees in latents (N, C, H, W) of the first level: for timing."""
        return self._denoise(
            latents[:, None], self.coding.sigmas[0], self._condition(0, len(latents))
        )

    @torch.inference_mode()
    def _code(self, latents: Tensor, first: int) -> tuple[Array, Array]:
        """Return the codes of one batch.

        A beam: the images that come nearest stay, half as many as are tried, and each goes on with
        its two best choices.
        """
        coding, count = self.coding, len(latents)
        begin = samplers.Step(0.0, (0.0,), math.sqrt(coding.sigmas[0] ** 2 + 1))
        steps = (begin, *samplers.plan("ancestral", coding.sigmas, {"eta": coding.eta}))
        condition = self._condition(first, count)
        wanted = latents[:, None]
        x = x0 = torch.zeros_like(wanted)  # (N, kept, C, H, W)
        atoms = torch.zeros((count, 1, 0), dtype=torch.long, device=latents.device)
        signs = atoms.clone()
        last = max(level for level, m in enumerate(coding.atoms) if m)
        for level, m in enumerate(coding.atoms[: last + 1]):
            step, kept = steps[level], x.shape[1]
            x = x * step.a + x0 * step.b[0]
            if not m:  # fresh noise, of which the encoder takes the mean
                x0 = self._denoise(x, coding.sigmas[level], condition)
                continue
            more, turned, chosen = self._choose(level, wanted - x0, self.tried // kept)
            choices = more.shape[2]
            again = _repeated(more * turned + turned)
            atoms = torch.cat([atoms.repeat_interleave(choices, 1), more.flatten(1, 2)], 2)
            signs = torch.cat([signs.repeat_interleave(choices, 1), turned.flatten(1, 2)], 2)
            if self.tried == 1 and level == last:  # nothing is left to compare or to choose
                break
            x = (x[:, :, None] + chosen * step.c).flatten(1, 2)
            x0 = self._denoise(x, coding.sigmas[level], condition)
            # those from which the backbone sees most of the photograph
            costs = (x0 - wanted).flatten(2).square().sum(2)
            costs = costs.masked_fill(again.flatten(1), math.inf)
            keep = max(1, min(self.tried // 2, costs.shape[1]))
            best = costs.topk(keep, 1, largest=False).indices
            rows = torch.arange(count, device=best.device)[:, None]
            x, x0, atoms, signs = (tensor[rows, best] for tensor in (x, x0, atoms, signs))
        return atoms[:, 0].cpu().numpy(), signs[:, 0].cpu().numpy()

    def _condition(self, first: int, count: int) -> Condition:
        if not self.coding.prompts:
            return unconditional(self.backbone, self.pack, guides=False).expand(count)
        assert self.pack.prompts is not None
        prompts = torch.from_numpy(decode_prompts(self.pack.prompts)[self.c].copy())
        template = self.pack.recipe.template
        modes = [
            self.backbone.condition(prompt[None].to(self.backbone.device), template)
            for prompt in prompts
        ]
        return Condition.cat(modes[i % len(modes)] for i in range(first, first + count))

    def _denoise(self, x: Tensor, sigma: float, condition: Condition) -> Tensor:
        """Return x0 of (N, kept, C, H, W) in as many forward passes as memory asks for."""
        flat = x.flatten(0, 1)
        owner = torch.arange(len(x)).repeat_interleave(x.shape[1])
        step = max(1, _VALUES // math.prod(flat.shape[1:]))
        parts = [slice(at, at + step) for at in range(0, len(flat), step)]
        made = [self.backbone.denoise(flat[p], sigma, condition[owner[p]]) for p in parts]
        return torch.cat(made).reshape(x.shape)

    def _choose(self, level: int, wanted: Tensor, tried: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return atoms, signs (N, kept, tried, m) and their noise for what is wanted."""
        rows, shape = wanted.flatten(0, 1).flatten(1), tuple(wanted.shape[2:])
        count = self.coding.atoms[level]
        if self.coding.entries * rows.shape[1] <= _PART:
            chosen = [_pursue(rows, self._codebook(level, shape), count, tried)]
        else:
            nearest = self._nearest(level, rows, shape, tried)
            chosen = []
            for row, entries in zip(rows[:, None], nearest, strict=True):
                book = self._entries(level, entries.cpu().numpy(), shape)
                own, *rest = _pursue(row, book, count, tried)
                chosen.append((entries[own], *rest))
        atoms, signs, noise = (
            torch.cat(parts).unflatten(0, wanted.shape[:2]) for parts in zip(*chosen, strict=True)
        )
        return atoms, signs, noise.unflatten(3, shape)

    def _nearest(self, level: int, rows: Tensor, shape: tuple[int, ...], tried: int) -> Tensor:
        """Return numbers of the entries, ascending, from which atoms are chosen for each row.

        In large latents entries are nearly orthogonal: what one atom explains hardly changes which
        others are near. So the codebook is computed once, in parts.
        """
        total, step = self.coding.entries, max(1, _PART // rows.shape[1])
        numbers = np.arange(total)
        parts = (self._entries(level, numbers[at : at + step], shape) for at in numbers[::step])
        near = torch.cat([rows @ part.T for part in parts], 1).abs()
        count = min(total, max(_NEAR * self.coding.atoms[level], tried))
        return near.topk(count, 1).indices.sort(1).values

    def _entries(self, level: int, numbers: Array, shape: tuple[int, ...]) -> Tensor:
        return codebook(self.pack.seed, level, numbers, shape, self.backbone.device).flatten(1)

    def _codebook(self, level: int, shape: tuple[int, ...]) -> Tensor:
        if self.coding.entries * math.prod(shape) > _KEPT:
            return self._entries(level, np.arange(self.coding.entries), shape)
        return _kept_book(self.pack.seed, level, self.coding.entries, shape, self.backbone.device)


def _pursue(wanted: Tensor, book: Tensor, count: int, tried: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return atoms, signs (N, tried, count) and their noise (N, tried, D) for wanted (N, D).

    One atom after another is taken, and what it explains is subtracted: in small latents, the
    entries of a codebook are not orthogonal. Trials begin with different atoms.
    """
    squares = book.square().sum(1)
    starts = (wanted @ book.T).abs().topk(tried, 1).indices.flatten()[:, None]
    rest = wanted.repeat_interleave(tried, 0)
    taken = torch.zeros(len(rest), len(book), dtype=torch.bool, device=rest.device)
    atoms: list[Tensor] = []
    signs: list[Tensor] = []
    for _ in range(count):
        product = rest @ book.T
        near = product.abs().masked_fill_(taken, -1.0)
        best = near.argmax(1, keepdim=True) if atoms else starts
        value = product.gather(1, best)
        taken.scatter_(1, best, True)
        rest = rest - book[best[:, 0]] * (value / squares[best])
        atoms.append(best)
        signs.append(torch.where(value < 0, -1, 1))
    ascending = torch.cat(atoms, 1).sort(1)
    sign = torch.cat(signs, 1).gather(1, ascending.indices)
    weights = torch.zeros_like(near).scatter_(1, ascending.values, sign.to(near.dtype))
    noise = weights @ book / math.sqrt(count)
    trials = (len(wanted), tried, -1)
    return ascending.values.reshape(trials), sign.reshape(trials), noise.reshape(trials)


def _repeated(choices: Tensor) -> Tensor:
    """Return which choices (N, kept, tried, m) are those of an earlier trial of the same latent."""
    if choices.shape[3] == 1:  # pursuits begin with different entries
        return torch.zeros(choices.shape[:3], dtype=torch.bool, device=choices.device)
    same = [(c[:, :, None] == c[:, None]).all(3).tril(-1).any(2) for c in choices]
    return torch.stack(same)


@lru_cache(maxsize=64)
def _kept_book(
    seed: int, level: int, entries: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    return codebook(seed, level, np.arange(entries), shape, device).flatten(1)
