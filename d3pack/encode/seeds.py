"""Curated seeds: those candidates that the teacher believes in, unlike each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d3pack.encode.generate import Judged

ALIKE = 1.0  # what likeness to an image already chosen costs, in nats of the teacher's belief


def lanes_of(count: int, modes: int, share: int = 1) -> int:
    """Lanes of candidates, each for `share` images of one mode."""
    return -(-count // (modes * share)) * modes


def candidates_of(count: int, modes: int, candidates: int, share: int) -> int:
    """Candidates of a class: `candidates` for each image, equally many in every lane."""
    lanes = lanes_of(count, modes, share)
    return -(-candidates * count // lanes) * lanes


def choose_order(judged: Judged, c: int, count: int, lanes: int) -> npt.NDArray[np.int64]:
    """Candidate numbers, greedily: each the most believed that is least like those before it.

    Image i is one of the candidates i, i + lanes, i + 2 lanes, ... Because the choice is greedy,
    the first k are what would have been chosen for k in these lanes.
    """
    logits = judged.logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    belief = shifted[:, c] - np.log(np.exp(shifted).sum(1))
    features = judged.features.astype(np.float64)
    nearest = np.zeros(len(belief))
    free = np.ones(len(belief), dtype=bool)
    chosen = []
    for i in range(count):
        here = free & (np.arange(len(belief)) % lanes == i % lanes)
        score = np.where(here, belief - ALIKE * nearest, -np.inf)
        best = int(score.argmax())
        chosen.append(best)
        free[best] = False
        nearest = np.maximum(nearest, features @ features[best])
    return np.asarray(chosen)
