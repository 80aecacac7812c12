"""Seconds of work on this machine, measured on a little of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from d3pack.encode.settings import EncodeSettings
from d3pack.sources import Source
from d3pack.teachers import SmallResNet, teacher_config


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the seconds of the second call: the first one pays for allocations."""
    work()
    wait_for_device()
    began = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - began


def wait_for_device() -> None:
    """Wait for the work of CUDA: calls return before it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def teacher_seconds(source: Source, typical: int, settings: EncodeSettings, device: str) -> float:
    """Return the seconds that the training of a small teacher takes."""
    lesson = teacher_config(typical, settings.teacher_samples, settings.seed, device)
    net = SmallResNet(len(source.classes), lesson.widths).to(device)
    x = torch.zeros((32, 3, lesson.size, lesson.size), device=device)
    target = torch.zeros(32, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=lesson.bf16):
            answers = net(x)
        loss = functional.cross_entropy(answers.float(), target)
        torch.autograd.grad(loss, list(net.parameters()))

    return seconds_of(step) / 32 * min(lesson.samples, lesson.epochs * sum(source.counts))
