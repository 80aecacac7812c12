"""On an accelerator the same run gives the same bytes, and leaves torch's settings alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from encode_world import make_tree

from d3pack.encode import EncodeSettings, NoSettings, driver
from d3pack.encode.driver import _deterministic


@pytest.mark.parametrize("warned", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_torch_settings_are_restored_after_a_deterministic_run(before: bool, warned: bool) -> None:
    cudnn: Any = torch.backends.cudnn  # its flags are properties that types do not know

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
        with _deterministic("cuda"):
            assert now() == (True, True, True, False)
            assert cudnn.conv.fp32_precision == "ieee"
        assert now() == outside
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_is_configured_before_a_method_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Method:
        name, settings = "mine", NoSettings

        def prepare(self, *_: Any) -> Any:
            raise RuntimeError(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(driver, "resolve_device", torch.device)
    source = make_tree(tmp_path / "source", 1)
    with pytest.raises(RuntimeError, match=":4096:8"):
        driver.encode(source, tmp_path / "x.d3m", EncodeSettings(device="cuda"), method=Method())
