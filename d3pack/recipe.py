"""How images are made: plain, immutable values that go into the manifest and come out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Sampler = Literal["ddim", "dpmpp-2m", "euler", "lcm", "table"]
DType = Literal["float32", "bfloat16", "float16"]

SAMPLERS: tuple[Sampler, ...] = ("ddim", "dpmpp-2m", "euler", "lcm", "table")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
NOISE = "philox-normal16"


@dataclass(frozen=True, slots=True)
class FileLock:
    """What one file of a backbone must be."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BackboneRef:
    """An exact reference to a diffusion model: the repository, its revision, and every needed byte."""

    kind: str  # "stable-diffusion", "dit", or a plugin's name
    repo: str  # "mini", "org/name", or "" for a directory that has no public home
    revision: str  # 40 hex digits; for a directory: derived from its files (see `directory_revision`)
    files: Mapping[str, FileLock]  # relative POSIX path -> lock
    licence: str = "unknown"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides prompt and seed that decides about the pixels."""

    backbone: BackboneRef
    size: tuple[int, int]  # height, width in pixels
    sampler: Sampler
    sigmas: tuple[float, ...]  # descending, VP-normalised x0 + sigma * eps scale, last one 0
    guidance: float = 1.0
    guided_channels: int = 0  # 0: all latent channels; DiT's original code guides the first 3
    template: str = "a photo of a {}"  # {} is where the learned vectors go; unused by class tables
    dtype: DType = "float32"
    group: int = 16  # the one micro-batch size at which every forward runs
    noise: str = NOISE
    extra: Mapping[str, Any] = field(default_factory=dict)  # sampler tables and plugin settings
