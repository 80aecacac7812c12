"""What a user can choose about `train_backbone`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d3pack.system import check, device_option, option, parse_duration

Preset = Literal["mini", "mini-gpu", "tiny"]
Stage = Literal["autoencoder", "text", "diffusion"]
STAGES: tuple[Stage, ...] = ("autoencoder", "text", "diffusion")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of `train_backbone`."""

    preset: Preset = option("mini", "Named configuration; tiny is for trials.")
    time_budget: float | None = option(
        None,
        "Time for all stages to train, as 90m: learning rates fall by its end.",
        gt=0,
        parse=parse_duration,
        metavar="TIME",
    )
    stages: tuple[Stage, ...] = option((), "Train only this stage; repeatable.", flag="--stage")
    init_from: str | None = option(
        None, "Start from a backbone, a directory or mini; trains its denoiser on.", metavar="DIR"
    )
    sentence_encoder: Path | None = option(
        None, "Directory of a sentence encoder that says which words are alike.", metavar="DIR"
    )
    words: Path | None = option(
        None, "File of nouns to learn beside the class names, one a line.", metavar="FILE"
    )
    licence: str = option("unknown", "Licence of the weights, as your images allow.")
    device: str | None = device_option()
    seed: int = option(0, "Seed of everything random.", ge=0)
    compile: bool = option(False, "Compile the models first; takes minutes on a CPU.")

    def __post_init__(self) -> None:
        check(self)

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """The stages to train: from given weights only the denoiser, unless stages are named."""
        return self.stages or (STAGES[2:] if self.init_from else STAGES)
