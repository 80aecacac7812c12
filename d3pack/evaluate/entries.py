"""Entries: the rows of an evaluation. Each says what a student is trained on, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format import Pack

Layout = Literal["files", "sheet"]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What one student is trained on, and the bytes that it takes to send."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,) or probabilities (N, C)
    nbytes: int | None = None  # None where nobody would send it
    note: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of an evaluation.

    Attributes:
        key: name of its files in the work directory, and in the JSON of the evaluation.
        title: what readers see.
        identity: what decides about the training set; a finished student of equal identity, under
            an equal protocol, is used again.
        build: the training set of a seed.
        detail: facts for the JSON of the evaluation.
        pack: the pack that is trained on, where it is one.
        hard: whether its soft labels are ignored.
    """

    key: str
    title: str
    identity: Mapping[str, Any]
    build: Callable[[int], TrainingSet]
    detail: Mapping[str, Any] = field(default_factory=dict)
    pack: Pack | None = None
    hard: bool = False


@dataclass(frozen=True, slots=True)
class PayloadFormat:
    """A way to send photographs: an image codec, and one file per image or one sheet of tiles.

    Attributes:
        name: name of the payload in keys and events.
        codec: how Pillow calls the codec.
        layout: "files" or "sheet".
        qualities: three qualities that are tried, ascending.
        encoders: arguments of Pillow's `save`; the smallest result counts.
    """

    name: str
    codec: str
    layout: Layout
    qualities: tuple[int, int, int]
    encoders: tuple[Mapping[str, Any], ...] = field(hash=False)

    @property
    def title(self) -> str:
        """What readers see."""
        return f"{self.codec} files" if self.layout == "files" else f"one {self.codec} sheet"


@dataclass(frozen=True, slots=True)
class PayloadSettings:
    """How strongly photographs are compressed: quality of the codec, and pixels of a side."""

    format: PayloadFormat
    quality: int
    side: int

    def __str__(self) -> str:
        return f"{self.format.codec} {self.format.layout} q{self.quality} {self.side} px"

    def to_json(self) -> dict[str, Any]:
        """Return what decides about the bytes, ready for JSON."""
        return {
            "form": self.format.codec,
            "layout": self.format.layout,
            "quality": self.quality,
            "side": self.side,
        }
