"""Which noise levels to look at: those where single samples differ most, each weighed back.

The gradient of a prompt is up to ten times as loud at one end of the noise levels as at the other.
Drawing a level in proportion to that loudness, and dividing by how often it is drawn, leaves the
mean gradient as it is and makes it known from about half as many samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BINS = 10  # of equal width, over all levels
FLOOR = 0.1  # share of the draws that is spread evenly: no weight is above 1 / FLOOR


@dataclass(frozen=True, slots=True)
class Density:
    """How often each tenth of the noise levels is drawn; the shares sum to one."""

    shares: Array

    @classmethod
    def even(cls) -> Density:
        """Every level as often as any other."""
        return cls(np.full(BINS, 1 / BINS))

    @classmethod
    def of_squares(cls, squares: Array) -> Density:
        """From the mean squared gradient in each bin."""
        loud = np.sqrt(squares)
        total = loud.sum()
        if total == 0:
            return cls.even()
        return cls(FLOOR / len(squares) + (1 - FLOOR) * loud / total)

    def place(self, uniform: Array) -> tuple[Array, Array]:
        """Levels in [0, 1) at these quantiles, and the weight of a sample there."""
        edges = np.concatenate([[0.0], np.cumsum(self.shares)])
        bins = np.clip(np.searchsorted(edges, uniform, side="right") - 1, 0, len(self.shares) - 1)
        within = (uniform - edges[bins]) / self.shares[bins]
        places = np.minimum((bins + within) / len(self.shares), np.nextafter(1.0, 0.0))
        return places, 1 / (len(self.shares) * self.shares[bins])
