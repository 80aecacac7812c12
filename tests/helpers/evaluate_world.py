"""A protocol that takes no time, and evaluations without what differs from run to run."""

from __future__ import annotations

import json
from dataclasses import replace

from d3pack.evaluate import Evaluation
from d3pack.evaluate.report import render
from d3pack.students.protocols import QUICK, Intervals, Updates

BLINK = replace(
    QUICK, name="blink", batch=((1 << 60, 8),), length=Updates(4), tests=Intervals(parts=2)
)


def figures(evaluation: Evaluation) -> tuple[str, str]:
    """All figures and the page, without the seconds, which were measured."""
    results = tuple(
        replace(result, histories=tuple(replace(h, seconds=0.0) for h in result.histories))
        for result in evaluation.results
    )
    still = replace(evaluation, results=results, decode_seconds=0.0)
    return json.dumps(still.to_json(), sort_keys=True), render(still)
