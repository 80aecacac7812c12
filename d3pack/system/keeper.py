"""Names of before, until every room has moved to `d3pack.system`."""

from d3pack.system.journal import CHECKPOINT_SECONDS as EVERY
from d3pack.system.journal import Checkpoint as JournalKeeper

__all__ = ["EVERY", "JournalKeeper"]
