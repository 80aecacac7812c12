"""Names of before, until every room has moved to `d3pack.system`."""

from d3pack.system.progress import View, live_view, spark

__all__ = ["View", "live_view", "spark"]
