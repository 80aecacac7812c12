"""What a pack is worth: students trained on it, and on real images of equal bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.evaluate.baselines import BASELINES, Baseline, baseline
    from d3pack.evaluate.bench import Bench, EntryResult, Workdir
    from d3pack.evaluate.entries import Entry, PayloadFormat, TrainingSet
    from d3pack.evaluate.evaluation import Evaluation, evaluate
    from d3pack.evaluate.protocols import PROTOCOLS, Protocol, Updates
    from d3pack.evaluate.report import report_path, write_report
    from d3pack.evaluate.settings import EvalSettings
    from d3pack.evaluate.students import STUDENTS

__all__ = [
    "BASELINES",
    "PROTOCOLS",
    "STUDENTS",
    "Baseline",
    "Bench",
    "Entry",
    "EntryResult",
    "EvalSettings",
    "Evaluation",
    "PayloadFormat",
    "Protocol",
    "TrainingSet",
    "Updates",
    "Workdir",
    "baseline",
    "evaluate",
    "report_path",
    "write_report",
]

__getattr__ = lazy_names(
    __name__,
    {
        "baselines": ["BASELINES", "Baseline", "baseline"],
        "bench": ["Bench", "EntryResult", "Workdir"],
        "entries": ["Entry", "PayloadFormat", "TrainingSet"],
        "evaluation": ["Evaluation", "evaluate"],
        "protocols": ["PROTOCOLS", "Protocol", "Updates"],
        "report": ["report_path", "write_report"],
        "settings": ["EvalSettings"],
        "students": ["STUDENTS"],
    },
)
