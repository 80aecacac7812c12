"""Probes: small reference images in the pack that tell whether this machine makes the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from d3pack.errors import UsageError
from d3pack.format.pack import Probes

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.decode.decoder import Decoder, Pair
    from d3pack.format.pack import Pack

Verdict = Literal["exact", "within tolerance", "wrong backbone"]
# 8-bit levels. Another machine's arithmetic moves a 20-step image by well under one level on
# average; another model, prompt or seed moves it by tens.
RMS, PEAK = 2.0, 48


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """How near the rebuilt probes are to the stored ones, in 8-bit levels."""

    verdict: Verdict
    rms: float
    peak: int
    probes: int
    different: int  # bytes that differ

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, h, w) by exact integer means over equal tiles."""
    count, channels, height, width = images.shape
    h, w = size
    if height % h or width % w:
        raise UsageError(f"probes of {h}x{w} do not tile images of {height}x{width}")
    tiles = images.reshape(count, channels, h, height // h, w, width // w).long()
    area = (height // h) * (width // w)
    return torch.div(2 * tiles.sum((3, 5)) + area, 2 * area, rounding_mode="floor").to(torch.uint8)


def make_probes(decoder: Decoder, pairs: Sequence[Pair], size: tuple[int, int]) -> Probes:
    """Build the probes that an encoder stores; only exact images will do."""
    if decoder.numerics.fast:
        raise UsageError("probes must be made with exact numerics")
    small = shrink(decoder.images(list(pairs)), size).cpu().numpy()
    labels, indices = np.array(pairs, dtype=np.uint32).T
    return Probes(small, labels, indices)


def verify_probes(pack: Pack, decoder: Decoder) -> ProbeReport:
    """Rebuild the stored probes: `exact`, `within tolerance` or `wrong backbone`."""
    probes = pack.probes
    if probes is None:
        raise UsageError("the pack has no probes", hint="it can be checked by its hashes alone")
    pairs = [(int(c), int(i)) for c, i in zip(probes.labels, probes.indices, strict=True)]
    stored = torch.from_numpy(np.array(probes.images))
    made = shrink(decoder.images(pairs), (stored.shape[2], stored.shape[3])).cpu()
    gap = (made.int() - stored.int()).abs()
    rms, peak = float(gap.double().square().mean().sqrt()), int(gap.max())
    near: Verdict = "within tolerance" if rms <= RMS and peak <= PEAK else "wrong backbone"
    return ProbeReport(
        "exact" if peak == 0 else near, round(rms, 4), peak, len(pairs), int((gap > 0).sum())
    )
