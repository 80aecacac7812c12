"""What a user chooses about an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from d3pack.errors import UsageError
from d3pack.evaluate.baselines import BASELINES
from d3pack.students import PROTOCOLS
from d3pack.system import SettingError, check, device_option, option

_HELP = "; ".join(f"{name}: {baseline.help}" for name, baseline in BASELINES.items())


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """Settings of `evaluate`."""

    protocol: str = option(
        "quick", "How students are trained and tested.", choices=tuple(PROTOCOLS)
    )
    seeds: int | None = option(
        None, "Students of each entry: 3, or as many as the protocol has.", ge=1
    )
    student: str | None = option(
        None, "Another student than the protocol's: convnet3, resnet18, vit6, hf:vit, ..."
    )
    size: int | None = option(
        None, "Pixels at which students work; else those of the test images.", ge=8, le=1024
    )
    baselines: tuple[str, ...] = option(
        tuple(name for name, baseline in BASELINES.items() if baseline.default),
        f"What to compare the pack with; repeatable. {_HELP}; none: nothing.",
        flag="--baseline",
        choices=(*BASELINES, "none"),
    )
    whole: bool = option(False, "Also train on all real images, as --baseline whole does.")
    teacher: str | None = option(
        None,
        "train, or a transformers classifier: chooses collages, and labels where a protocol asks.",
        private=True,
    )
    sweep: tuple[str, ...] = option(
        (), "Variants of the pack: ipc=1,5 codec=f16,i4 labels=none,top2 vectors=1,4; repeatable."
    )
    device: str | None = device_option()
    backbone: str | None = option(
        None, "Diffusion model of the pack: its directory, checked by the lock.", private=True
    )
    allow_long: bool = option(False, "Start even if it takes hours.", flag="--yes")

    def __post_init__(self) -> None:
        check(self)
        names = () if self.baselines == ("none",) else self.baselines
        if "none" in names:
            raise SettingError("baselines", ", ".join(names), "none alone, or names of baselines")
        if self.whole and "whole" not in names:
            names += ("whole",)
        object.__setattr__(self, "baselines", names)
        if self.teacher is not None:
            return
        hint = "give one as teacher=: train, or a transformers classifier"
        for name in names:
            if BASELINES[name].needs_teacher:
                raise UsageError(f"baseline {name} needs a teacher", hint=hint)
        if PROTOCOLS[self.protocol].labels == "teacher":
            raise UsageError(f"protocol {self.protocol} needs a teacher", hint=hint)
