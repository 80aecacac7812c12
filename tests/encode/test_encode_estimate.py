"""Timing of a little work, which waits for the device, and how long a teacher is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encode_world import make_tree, quick

from d3pack.encode import EncodeContext, EncodePlan, EncodeSettings, sampler_search
from d3pack.encode.allocation import SMALLEST
from d3pack.encode.methods.d3m.method import D3M
from d3pack.encode.teaching import CHOOSING, small_teacher
from d3pack.sources import open_source
from d3pack.system import seconds_of
from d3pack.teachers import SAMPLES


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


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({}, 3 * CHOOSING),
        ({"labels": "top2"}, SAMPLES),
        ({"candidates": 2}, SAMPLES),
        ({"candidates": 16, "select": "draws"}, 3 * CHOOSING),
        ({"candidates": 16, "select": "draws", "labels": "top2"}, SAMPLES),
        ({"candidates": 2, "select": "s3"}, SAMPLES),
        ({"codes": 1}, SAMPLES),
        ({"budget": 20_000}, SAMPLES),
        ({"labels": "top2", "teacher_samples": 7}, 7),
        ({"teacher_samples": 1}, 1),
    ],
    ids=str,
)
def test_a_teacher_that_only_chooses_patches_is_trained_for_less(
    home: Path, changes: dict[str, Any], samples: int
) -> None:
    values = {"candidates": 1, "labels": "none", "teacher_samples": None, **changes}
    settings = quick(home / "sd", **values)
    job = D3M().prepare(
        open_source(home / "source"),
        settings,
        settings.method_settings,
        EncodeContext("cpu", home / "cache"),
    )
    plan = job.describe()
    config = small_teacher(plan, settings, "cpu", choosing=job._only_chooses)
    assert config.samples == samples


def test_of_large_images_it_sees_as_many(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "few", 1))
    plan = EncodePlan.of(source, EncodeSettings(), size=(64, 64), allocation=SMALLEST, typical=64)
    found = [small_teacher(plan, EncodeSettings(), "cpu", choosing=few) for few in (True, False)]
    assert [config.size for config in found] == [64, 64]
    assert [config.samples for config in found] == [3 * CHOOSING, SAMPLES // 4]


def test_of_many_classes_it_is_never_trained_for_more(tmp_path: Path) -> None:
    names = tuple(f"class {c}" for c in range(51))
    source = open_source(make_tree(tmp_path / "many", 1, names))
    plan = EncodePlan.of(source, EncodeSettings(), size=(64, 64), allocation=SMALLEST)
    assert small_teacher(plan, EncodeSettings(), "cpu", choosing=True).samples == SAMPLES
