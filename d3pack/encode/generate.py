"""Images of a pack in the making, judged by the teacher, class by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.format.pack import Pack
from d3pack.system.events import Events
from d3pack.system.journal import Journal
from d3pack.teachers import Teacher, batched

Array = npt.NDArray[np.float32]
SHOWN = 4  # images of a class kept for the contact sheet


@dataclass(frozen=True, slots=True)
class Judged:
    """What the teacher says about the images of one class."""

    logits: Array  # (N, C)
    features: Array  # (N, F), unit vectors


def judge_images(
    pack: Pack, backbone: Backbone, teacher: Teacher, journal: Journal, events: Events, folder: str
) -> Callable[[int], Judged]:
    """Make every image of the pack exactly and let the teacher answer; read back class by class."""
    todo = [c for c in range(len(pack.classes)) if not _path(journal, folder, c)]
    with events.stage(f"make and judge {folder}", len(pack.classes), "classes"):
        decoder = Decoder(pack, device=backbone.device, backbone=backbone)
        for done, c in enumerate(todo, len(pack.classes) - len(todo) + 1):
            images = decoder.images([(c, i) for i in range(pack.images_per_class)]).cpu()
            logits, features = batched(teacher, images)
            arrays = {"logits": logits.numpy(), "features": features.numpy()}
            journal.save(f"{folder}/{c:06d}", arrays, {})
            events.step(done, samples=done * pack.images_per_class)

    def judged(c: int) -> Judged:
        found = journal.load(f"{folder}/{c:06d}")
        assert found is not None
        return Judged(found[0]["logits"], found[0]["features"])

    return judged


def _path(journal: Journal, folder: str, c: int) -> bool:
    return (journal.folder / f"{folder}/{c:06d}.safetensors").exists()


def agreement(judged: Callable[[int], Judged], classes: int) -> float:
    """Share of images that the teacher gives to their own class."""
    right = [float((judged(c).logits.argmax(1) == c).mean()) for c in range(classes)]
    return round(float(np.mean(right)), 4)


def probabilities(logits: Array, temperature: float) -> Array:
    """Softmax of the logits at a temperature."""
    return torch.softmax(torch.from_numpy(logits).double() / temperature, dim=1).float().numpy()
