"""Names of before, until every room has moved to `d3pack.system`."""

from d3pack.system.progress import Events, Listener, json_lines, log_file

__all__ = ["Events", "Listener", "json_lines", "log_file"]
