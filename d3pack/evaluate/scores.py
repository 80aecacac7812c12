"""Summaries over seeds, and the scores of DD-Ranking (NUS-HPC-AI-Lab/DD-Ranking)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over seeds; 0 for one seed."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std)


def hard_label_recovery(whole: float, synthetic_hard: float) -> float:
    """HLR: what is lost against training on the whole real set; smaller is better."""
    return whole - synthetic_hard


def improvement_over_random(synthetic: float, random: float) -> float:
    """IOR: what is gained over as many random real images; larger is better."""
    return synthetic - random


def label_robust_score(recovery: float, improvement: float, weight: float = WEIGHT) -> float:
    """LRS: both in one figure between 0 and 1; larger is better. Accuracies as shares of 1."""
    alpha = weight * improvement - (1 - weight) * recovery
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def above_chance(accuracy: float, classes: int) -> float:
    """Accuracy less what guessing gives."""
    return accuracy - 1 / classes
