"""What every room stands on: files, journals, progress, text."""

from __future__ import annotations

from d3pack.system.extras import missing_extra, require

__all__ = ["missing_extra", "require"]
