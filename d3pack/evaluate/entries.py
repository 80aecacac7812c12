"""Entries: the rows of an evaluation. Each says what a student is trained on, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from d3pack.students import LabelledImages

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.format import Pack
    from d3pack.students import RealImages

# (images, most of a class, images of each class in the draw of seed 0 to leave out) -> those of
# each class, best first
Select = Callable[["RealImages", int, Sequence[int]], "list[Tensor]"]
Layout = Literal["files", "sheet"]
_LARGEST_WHOLE = 64  # pixels: RDED makes no collages of CIFAR and Tiny-ImageNet


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of an evaluation.

    Attributes:
        key: name of its files in the work directory, and in the JSON of the evaluation.
        title: what readers see.
        identity: what decides about the training set; a finished student of equal identity, under
            an equal protocol, is used again.
        build: returns the training set of a seed.
        detail: facts for the JSON of the evaluation.
        pack: the pack that is trained on, where it is one.
        hard: whether its soft labels are ignored.
        whole: whether it is all real images, for which a protocol may have a schedule of its own.
    """

    key: str
    title: str
    identity: Mapping[str, Any]
    build: Callable[[int], LabelledImages]
    detail: Mapping[str, Any] = field(default_factory=dict)
    pack: Pack | None = None
    hard: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class PayloadFormat:
    """A way to send photographs: an image codec, and a file for each or one sheet of tiles.

    Attributes:
        name: name of the payload in keys and events.
        codec: name of the codec, as Pillow knows it.
        layout: "files" or "sheet".
        qualities: three qualities to try, ascending.
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
class Choice:
    """How the photographs of a class are chosen: by a teacher, or by a function.

    Attributes:
        name: name of the baseline.
        help: what is chosen, in a few words.
        crops: trial crops of each photograph; 1: it is looked at whole.
        scale: share of its area that a crop shows.
        select: chooses in place of a teacher; the name stands for it where results are kept.
    """

    name: str
    help: str
    crops: int = 1
    scale: tuple[float, float] = (1.0, 1.0)
    select: Select | None = field(default=None, repr=False)

    def factor(self, size: int) -> int:
        """Return the side of a collage in patches: crops of large images are set in fours."""
        return 2 if self.crops > 1 and size > _LARGEST_WHOLE else 1


@dataclass(frozen=True, slots=True)
class PayloadSettings:
    """How strongly photographs are compressed: quality of the codec, and pixels of a side."""

    format: PayloadFormat
    quality: int
    side: int

    def __str__(self) -> str:
        return f"{self.format.codec} {self.format.layout} q{self.quality} {self.side} px"
