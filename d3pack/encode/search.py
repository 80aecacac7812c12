"""Sampler, steps and guidance by measurement: the best images that the time allows.

The paper of the class-conditional method scores images a second as well as students, and says
nothing on how to choose. Ours: every setting of a small grid makes a few images of each class;
the teacher compares them with as many real ones. The distance is the energy distance between
features, class by class, so that a wrong class, a blurred one and one image over and over all
cost. Among the settings that meet the time limit, those within `SLACK` of the nearest are as good
as equal, and of these the one with the fewest forwards is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone
from d3pack.decode import Decoder
from d3pack.encode.estimate import settle
from d3pack.encode.options import EncodeOptions
from d3pack.encode.plan import sigmas_of
from d3pack.errors import UsageError
from d3pack.format.pack import Pack
from d3pack.format.recipe import Sampler
from d3pack.system.events import Events
from d3pack.system.journal import Journal
from d3pack.teachers import Teacher

STEPS = (4, 6, 8, 12, 18)
GUIDANCES = (1.0, 1.5, 2.5, 4.0)
SLACK = 1.05
_NAME = "sampler"

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to sample."""

    sampler: Sampler
    steps: int
    guidance: float

    @property
    def forwards(self) -> int:
        """Of the denoiser, for one image."""
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps} steps, guidance {self.guidance:g}"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a setting came to."""

    setting: Setting
    right: float  # share of images that the teacher gives to their class
    distance: float  # energy distance to real features, mean over classes


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds for one image on this machine, all its cores at work."""

    forward: float
    rest: float  # noise, autoencoder

    def seconds(self, setting: Setting) -> float:
        return self.rest + self.forward * setting.forwards


def grid(options: EncodeOptions) -> list[Setting]:
    """What is tried; dials set by hand stay as they are."""
    sampler = options.sampler or "dpmpp-2m"
    steps = (options.sampler_steps,) if options.sampler_steps else STEPS
    guidances = GUIDANCES if options.guidance is None else (options.guidance,)
    return [Setting(sampler, n, g) for n in steps for g in guidances]


def with_setting(pack: Pack, backbone: Backbone, setting: Setting) -> Pack:
    """The pack, sampled that way."""
    recipe = replace(
        pack.recipe,
        sampler=setting.sampler,
        sigmas=sigmas_of(backbone, setting.sampler, setting.steps),
        guidance=setting.guidance,
    )
    return replace(pack, recipe=recipe)


def choose(trials: Sequence[Trial], speed: Speed, limit: float) -> Trial:
    """The nearest that is quick enough, or a cheaper one that is as near; `limit` 0 is none."""
    quick = [t for t in trials if not limit or speed.seconds(t.setting) <= limit]
    if not quick:
        fastest = min(speed.seconds(t.setting) for t in trials)
        raise UsageError(
            f"no sampler is quick enough: an image takes {fastest:.4f} s at least, and"
            f" --decode-seconds leaves {limit:.4f} s for it",
            hint="allow more seconds or make fewer images",
        )
    # of unbiased estimates the smallest may be negative: slack is measured from above zero
    near = SLACK * max(min(t.distance for t in quick), 0.0) + 1e-4
    good = [t for t in quick if t.distance <= near]
    return min(good, key=lambda t: (t.setting.forwards, t.distance))


def search(
    pack: Pack,
    backbone: Backbone,
    teacher: Teacher,
    real: Callable[[int], Images],
    options: EncodeOptions,
    journal: Journal,
    events: Events,
    *,
    images: int,
    decode_seconds: float,
) -> Trial:
    """Try the grid with `images` images in all; what is measured stays in the journal."""
    settings = grid(options)
    classes = range(len(pack.classes))
    each = max(4, images // len(classes))
    # noise of its own: the images of the pack are not those that chose the sampler
    trial_pack = replace(pack, images_per_class=each, seed=pack.seed + 2**63)
    if "speed" not in journal:
        journal.record("speed", _measure(trial_pack, backbone))
    speed = Speed(**journal["speed"])
    features = [_features(teacher, real(c)) for c in classes]
    found: dict[str, Any] = dict(journal[_NAME]) if _NAME in journal else {}
    with events.stage("choose the sampler", len(settings), "settings"):
        for done, setting in enumerate(settings, 1):
            if str(setting) not in found:
                one = with_setting(trial_pack, backbone, setting)
                found[str(setting)] = _try(one, backbone, teacher, features)
                journal.record(_NAME, found)
            events.step(done, **found[str(setting)])
    trials = [Trial(setting, **found[str(setting)]) for setting in settings]
    best = choose(trials, speed, decode_seconds / len(pack) if decode_seconds else 0.0)
    events.note(
        f"sampler: {best.setting}: {100 * best.right:.1f} % right, distance {best.distance:.4f}, "
        f"{1 / speed.seconds(best.setting):.1f} images/s here"
    )
    return best


def energy_distance(made: Tensor, real: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| in units of the last, without bias; 0: no difference."""

    def inner(a: Tensor) -> Tensor:
        return torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))

    across = torch.cdist(made, real).mean()
    own = inner(real)
    return float((2 * across - inner(made) - own) / own)


def differ(features: Tensor) -> bool:
    """Whether these images can be measured against: a distance needs two that differ."""
    return bool((features != features[0]).any())


def _features(teacher: Teacher, images: Images) -> Tensor:
    return teacher.features(torch.from_numpy(images)).double()


def _try(
    pack: Pack, backbone: Backbone, teacher: Teacher, real: Sequence[Tensor]
) -> Mapping[str, float]:
    decoder = Decoder(pack, device=backbone.device, backbone=backbone)
    made = decoder.images(range(len(pack))).cpu()
    answers = teacher.logits(made).argmax(1).reshape(len(pack.classes), -1)
    right = answers == torch.arange(len(pack.classes))[:, None]
    features = teacher.features(made).double().reshape(len(pack.classes), len(answers[0]), -1)
    measured = [(f, r) for f, r in zip(features, real, strict=True) if differ(r)]
    distances = [energy_distance(f, r) for f, r in measured] or [0.0]
    return {
        "right": round(float(right.double().mean()), 4),
        "distance": round(float(np.mean(distances)), 6),
    }


def _measure(pack: Pack, backbone: Backbone) -> Mapping[str, float]:
    """Two step counts without guidance: the slope is a forward, what is left is the rest."""

    def seconds(steps: int) -> float:
        one = with_setting(pack, backbone, Setting("ddim", steps, 1.0))
        decoder = Decoder(one, device=backbone.device, backbone=backbone)
        # a CPU has a group on every core, an accelerator one at a time
        on_cpu = backbone.device.type == "cpu"
        many = decoder.group * (2 * torch.get_num_threads() if on_cpu else 1)
        numbers = [i % len(one) for i in range(many)]
        decoder.images(numbers[: decoder.group])
        settle()
        began = time.perf_counter()
        decoder.images(numbers)
        settle()
        return (time.perf_counter() - began) / many

    few, more = seconds(2), seconds(10)
    forward = max((more - few) / 8, 1e-9)
    return {"forward": forward, "rest": max(few - 2 * forward, 1e-9)}
