"""The specification's own programs are tested as they stand."""

from __future__ import annotations

import sys
from pathlib import Path

SPEC = Path(__file__).resolve().parents[2] / "spec"
sys.path.insert(0, str(SPEC))
