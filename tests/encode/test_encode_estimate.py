"""Timing of a little work: it waits for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3pack.encode import sampler_search
from d3pack.encode.estimate import seconds_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CUDA that records when it was waited for."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("wait"))
    return found


def test_timing_waits_for_the_device_before_and_after(calls: list[Any]) -> None:
    seconds_of(lambda: calls.append("work"))
    assert calls == ["work", "wait", "work", "wait"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_speed_is_measured_by_the_group_on_an_accelerator(
    device: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SimpleNamespace(group=4, images=lambda numbers: calls.append(len(numbers)))
    monkeypatch.setattr(sampler_search, "Decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(sampler_search, "with_sampling", lambda *_: None)
    monkeypatch.setattr(sampler_search, "replace", lambda *_, **__: range(10))
    backbone: Any = SimpleNamespace(device=torch.device(device))
    pack: Any = SimpleNamespace(recipe=None)
    speed = sampler_search._measure_speed(pack, backbone)
    assert set(speed) == {"forward", "rest"}
    many = 4 if device == "cuda" else 8 * torch.get_num_threads()
    assert calls == [4, "wait", many, "wait"] * 2
