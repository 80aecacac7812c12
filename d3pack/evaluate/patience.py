"""How long an evaluation takes, said before it starts; hours need a yes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from d3pack.errors import UsageError
from d3pack.evaluate.baselines import Arm
from d3pack.evaluate.bench import PILOT_SHARE, Bench
from d3pack.system.text import count, duration

if TYPE_CHECKING:
    from d3pack.evaluate.evaluation import EvalOptions

PATIENCE = 3600.0  # seconds that start without being asked for


def check_patience(
    bench: Bench, arms: Sequence[Arm], options: EvalOptions, images: int, *, later: int, pilots: int
) -> None:
    """Say how long the missing students take; refuse hours that nobody agreed to.

    `later` is how many arms there will be only after the pilots: none of their students is there.
    """
    missing = sum(not bench.finished(arm, seed) for arm in arms for seed in range(options.seeds))
    missing += later * options.seeds
    bench.expect(missing)
    if missing == 0:
        return
    each = bench.seconds_each(images)
    total = each * (missing + pilots / PILOT_SHARE)
    what = count(missing, "student") + (f" and {count(pilots, 'pilot')}" if pilots else "")
    bench.report(f"{what} to train, about {duration(each)} a student: {duration(total)}")
    if total > PATIENCE and not options.agreed:
        raise UsageError(
            f"{what} of preset {bench.preset.name}: about {duration(total)} on this machine",
            code="E_LONG",
            hint="add --yes to start (it can be stopped and resumed), or use --preset quick",
        )
