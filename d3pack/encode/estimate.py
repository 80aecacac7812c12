"""Seconds of work on this machine, measured on a little of it."""

from __future__ import annotations

from functools import partial

import torch

from d3pack.encode.plan import EncodePlan
from d3pack.encode.settings import EncodeSettings
from d3pack.encode.teaching import small_teacher
from d3pack.sources import Source
from d3pack.system import seconds_of
from d3pack.teachers import Muon, SmallResNet, teacher_loss


def teacher_seconds(
    source: Source,
    plan: EncodePlan,
    settings: EncodeSettings,
    device: str,
    *,
    choosing: bool = False,
) -> float:
    """Return the seconds that the training of a small teacher takes."""
    config = small_teacher(plan, settings, device, choosing=choosing)
    net = SmallResNet(len(source.classes), config.widths).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Muon(net, config)
    many = 64  # fewer take longer each
    target = torch.zeros(many, dtype=torch.long, device=device)

    def learn(side: int) -> None:
        x = torch.zeros((many, 3, side, side), device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.autograd.backward([teacher_loss(net, x, target, config)])

    an_image, begin = 0.0, 0.0
    for end, side in config.stages():
        an_image += (end - begin) * seconds_of(partial(learn, side)) / many
        begin = end
    images = sum(source.counts)
    batch, steps = min(config.batch, images), config.steps(images)
    return steps * (batch * an_image + seconds_of(partial(optimizer.step, 0.0)))
