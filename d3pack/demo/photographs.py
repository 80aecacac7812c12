"""The example of photographs: a pack of CIFAR-10 and what was measured with it.

Learning its prompts and training its students takes hours, so both come along as files, copied from
the committed results by `python -m benchmarks demo`. The images are rebuilt here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import d3pack
from d3pack.decode import Decoder
from d3pack.format import Pack
from d3pack.preview import Sample, sample

SHOWN = 16  # images of each class


@dataclass(frozen=True, slots=True)
class Photographs:
    """The pack, some of its images, and the figures of its evaluation."""

    pack: Pack
    shown: Sample
    figures: dict[str, Any]


def example_pack() -> Pack:
    """Return the pack of CIFAR-10 that comes with d3pack."""
    return d3pack.read(str(resources.files("d3pack.demo").joinpath("cifar10.d3m")))


def example_figures() -> dict[str, Any]:
    """Return what was measured: the protocol, and a row for each thing to train on."""
    text = resources.files("d3pack.demo").joinpath("cifar10.json").read_text(encoding="utf-8")
    figures: dict[str, Any] = json.loads(text)
    return figures


def rebuild_photographs(images: int = SHOWN) -> Photographs:
    """Read the pack and decode the first images of each class."""
    pack = example_pack()
    with Decoder(pack, device="cpu") as decoder:
        shown = sample(pack, decoder, classes=len(pack.classes), images=images)
    return Photographs(pack, shown, example_figures())
