"""On an accelerator the same run gives the same bytes, and leaves torch's settings alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from d3pack import encode as room
from d3pack.encode import EncodeOptions, _repeatable


@pytest.mark.parametrize("warned", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_settings_are_held_and_given_back(before: bool, warned: bool) -> None:
    cudnn = torch.backends.cudnn

    def now() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            cudnn.enabled,
            cudnn.benchmark,
        )

    torch.use_deterministic_algorithms(before, warn_only=warned)
    try:
        outside = now()
        with _repeatable("cuda"):
            assert now() == (True, True, True, False)
            assert cudnn.conv.fp32_precision == "ieee"
        assert now() == outside
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_is_told_before_a_method_opens_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Method:
        def plan(self, *_: Any) -> None:
            raise RuntimeError(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(room, "open_method", lambda _: Method())
    source: Any = None
    with pytest.raises(RuntimeError, match=":4096:8"):
        room.encode(source, EncodeOptions(device="cuda"), tmp_path / "x.d3m")
