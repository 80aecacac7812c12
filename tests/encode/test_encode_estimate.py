"""Timing waits for the device, before and after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3pack.encode import search
from d3pack.encode.estimate import seconds_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CUDA that only says when it was waited for."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("wait"))
    return found


def test_a_device_is_waited_for_on_both_sides(calls: list[Any]) -> None:
    seconds_of(lambda: calls.append("work"))
    assert calls == ["work", "wait", "work", "wait"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_accelerator_is_timed_by_the_group(
    device: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SimpleNamespace(group=4, images=lambda numbers: calls.append(len(numbers)))
    monkeypatch.setattr(search, "Decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(search, "with_setting", lambda *_: range(10))
    backbone: Any = SimpleNamespace(device=torch.device(device))
    pack: Any = None
    found = search._measure(pack, backbone)
    assert set(found) == {"forward", "rest"}
    many = 4 if device == "cuda" else 8 * torch.get_num_threads()
    assert calls == [4, "wait", many, "wait"] * 2
