"""What work will cost on this machine, from a few seconds of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from d3pack.encode.options import EncodeOptions
from d3pack.sources import Source
from d3pack.teachers import SmallResNet, teacher_config


def seconds_of(work: Callable[[], Any]) -> float:
    """Those of the second call: the first one pays for allocations."""
    work()
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    """Wait for what CUDA has been given: calls return before their work is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def timings(stages: dict[str, float]) -> dict[str, Any]:
    """Seconds by stage and in all, as a dry run prints them."""
    return {
        "seconds": {name: round(value, 3) for name, value in stages.items()},
        "seconds_total": round(sum(stages.values()), 3),
    }


def teacher_seconds(
    source: Source, typical: int, options: EncodeOptions, device: torch.device
) -> float:
    lesson = teacher_config(typical, options.teacher_samples, options.seed, str(device))
    net = SmallResNet(len(source.classes), lesson.widths).to(device)
    x = torch.zeros((32, 3, lesson.size, lesson.size), device=device)
    target = torch.zeros(32, dtype=torch.long, device=device)

    def teach() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=lesson.bf16):
            answers = net(x)
        loss = functional.cross_entropy(answers.float(), target)
        torch.autograd.grad(loss, list(net.parameters()))

    one = seconds_of(teach) / 32
    return one * min(lesson.samples, lesson.epochs * sum(source.counts))
