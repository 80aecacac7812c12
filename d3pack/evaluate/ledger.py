"""Bytes beside accuracies: what a pack costs when its backbone is there, and when nothing is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from d3pack.format.pack import Pack


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The bytes of a pack as an evaluation shows them."""

    pack: int  # the file
    sections: Mapping[str, int]
    labels: int
    adapter: int
    teacher: int | None
    backbone: int
    marginal: int  # the backbone is there already, for this pack as for others
    sent: int  # the file, and its backbone where that has no public home
    everything: int  # nothing is there: file, backbone and teacher
    jpeg: float  # mean bytes of one real image as a JPEG file of quality 75
    break_even_marginal: int  # that many JPEG files weigh as much as the pack
    break_even_everything: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sections": dict(self.sections)}


def sent(pack: Pack) -> int:
    """Bytes that must travel: the file, and beside it a backbone that nobody else offers."""
    ledger = pack.ledger()
    return ledger.total + (0 if pack.recipe.backbone.repo else ledger.backbone)


def view(pack: Pack, jpeg: float) -> LedgerView:
    """The ledger of a pack beside real images of `jpeg` bytes each."""
    ledger = pack.ledger()
    return LedgerView(
        pack=ledger.total,
        sections=dict(ledger.sections),
        labels=ledger.sections.get("labels", 0),
        adapter=ledger.sections.get("adapter", 0),
        teacher=ledger.teacher,
        backbone=ledger.backbone,
        marginal=ledger.total,
        sent=sent(pack),
        everything=ledger.everything,
        jpeg=jpeg,
        break_even_marginal=math.ceil(ledger.total / jpeg),
        break_even_everything=math.ceil(ledger.everything / jpeg),
    )
