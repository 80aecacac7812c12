"""What holds for all tests of decoding."""

from __future__ import annotations

import math

import pytest


@pytest.fixture(autouse=True)
def one_report_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports report what is written, also where a machine at other work is slow."""
    monkeypatch.setattr("d3pack.decode.export._LONG_GROUP", math.inf)
