"""Candidates for the images of a pack: how many, the answers of the teacher, the picks.

The candidates of a class lie in lanes: image i is one of the candidates i, i + lanes,
i + 2 lanes, ... so that a pick needs few bits, and every mode has candidates of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.encode.contract import EncodeRun
from d3pack.format import Pack
from d3pack.system import Arrays, Journal
from d3pack.teachers import Teacher, batched

Array = npt.NDArray[np.float32]
LIKENESS_COST = 1.0  # of an image like one that is picked already, in nats of the teacher's belief


def lanes_of(count: int, modes: int, share: int = 1) -> int:
    """Return the number of lanes of candidates, each for `share` images of one mode."""
    return -(-count // (modes * share)) * modes


def candidates_of(count: int, modes: int, candidates: int, share: int) -> int:
    """Return the candidates of a class: `candidates` per image, equally many in every lane."""
    lanes = lanes_of(count, modes, share)
    return -(-candidates * count // lanes) * lanes


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of the teacher on images of one class."""

    logits: Array  # (N, C)
    features: Array  # (N, F), unit vectors


def ask_teacher(
    run: EncodeRun,
    pack: Pack,
    backbone: Backbone,
    teacher: Teacher,
    folder: str,
    *,
    last: bool = False,
) -> Callable[[int], Answers]:
    """Make every image of a pack and keep the teacher's answers in `folder` of the journal.

    Args:
        last: whether a shard has nothing to do after this.

    Returns:
        A function that reads the answers for a class.
    """

    def look(images: Tensor) -> Arrays:
        logits, features = batched(teacher, images)
        return {"logits": logits.numpy(), "features": features.numpy()}

    names = make_images(run, pack, backbone, folder, look, last=last)

    def answers(c: int) -> Answers:
        arrays = stored_arrays(run.journal, names[c])
        return Answers(arrays["logits"], arrays["features"])

    return answers


def make_images(
    run: EncodeRun,
    pack: Pack,
    backbone: Backbone,
    folder: str,
    look: Callable[[Tensor], Arrays],
    *,
    last: bool = False,
) -> list[str]:
    """Make every image of a pack, and keep what was seen of each class in `folder` of the journal.

    Args:
        look: what is kept of the images of a class.
        last: whether a shard has nothing to do after this.

    Returns:
        The names of the arrays of each class in the journal.
    """
    names = [f"{folder}/{c:06d}" for c in range(len(pack.classes))]
    stage = f"make and judge {folder.partition('/')[0]}"
    done = sum(map(run.journal.has, names))
    with run.events.stage(stage, len(names), "classes", part="images", done=done):
        decoder = Decoder(pack, device=backbone.device, backbone=backbone)
        for c in run.units(stage, names, last=last):
            images = decoder.images([(c, i) for i in range(pack.images_per_class)]).cpu()
            run.journal.save(names[c], look(images), {})
            done += 1
            run.events.step(done, samples=done * pack.images_per_class)
    return names


def stored(journal: Journal, name: str) -> tuple[Arrays, dict[str, Any]]:
    """Return arrays and facts that an earlier stage has stored."""
    values = journal.load(name)
    assert values is not None, name
    return values


def stored_arrays(journal: Journal, name: str) -> Arrays:
    """Return arrays that an earlier stage has stored."""
    return stored(journal, name)[0]


def pick_order(answers: Answers, c: int, count: int, lanes: int) -> npt.NDArray[np.int64]:
    """Return numbers of candidates, greedily: the most believed that are least like earlier ones.

    Because the choice is greedy, the first k are those that would be chosen for k in these lanes.
    """
    logits = answers.logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    belief = shifted[:, c] - np.log(np.exp(shifted).sum(1))
    features = answers.features.astype(np.float64)
    nearest = np.zeros(len(belief))
    free = np.ones(len(belief), dtype=bool)
    picks = []
    for i in range(count):
        in_lane = free & (np.arange(len(belief)) % lanes == i % lanes)
        score = np.where(in_lane, belief - LIKENESS_COST * nearest, -np.inf)
        best = int(score.argmax())
        picks.append(best)
        free[best] = False
        nearest = np.maximum(nearest, features @ features[best])
    return np.asarray(picks)


def agreement(answers: Callable[[int], Answers], classes: int) -> float:
    """Return the share of images that the teacher assigns to their own class."""
    right = [float((answers(c).logits.argmax(1) == c).mean()) for c in range(classes)]
    return round(float(np.mean(right)), 4)


def probabilities(logits: Array, temperature: float) -> Array:
    """Return the softmax of logits at a temperature."""
    return torch.softmax(torch.from_numpy(logits).double() / temperature, dim=1).float().numpy()
