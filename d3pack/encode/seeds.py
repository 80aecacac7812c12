"""Curated seeds: the candidates that the teacher believes in, unlike each other, best first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d3pack.encode.generate import Judged

ALIKE = 1.0  # what likeness to an image already chosen costs, in nats of the teacher's belief


def choose_order(judged: Judged, c: int, count: int, modes: int) -> npt.NDArray[np.int64]:
    """Candidate numbers, greedily: each the most believed that is least like those before it.

    Because the choice is greedy, the first k are the best k. Image i is made with mode i mod m, and
    candidate j with mode j mod m: image i can only be a candidate of its own mode.
    """
    logits = judged.logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    belief = shifted[:, c] - np.log(np.exp(shifted).sum(1))
    likeness = judged.features.astype(np.float64) @ judged.features.T.astype(np.float64)
    nearest = np.zeros(len(belief))
    free = np.ones(len(belief), dtype=bool)
    chosen = []
    for i in range(count):
        here = free & (np.arange(len(belief)) % modes == i % modes)
        score = np.where(here, belief - ALIKE * nearest, -np.inf)
        best = int(score.argmax())
        chosen.append(best)
        free[best] = False
        nearest = np.maximum(nearest, likeness[:, best])
    return np.asarray(chosen)
