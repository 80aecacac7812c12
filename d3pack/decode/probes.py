"""Probes: small reference images in a pack, which tell whether this machine makes the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from d3pack.decode.limits import check_memory, check_time, expected_seconds
from d3pack.errors import BackboneError, UsageError
from d3pack.format import Probes
from d3pack.system import count

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.decode.decoder import Decoder
    from d3pack.decode.pairs import Pair
    from d3pack.format import Pack
    from d3pack.system import Counter

Verdict = Literal["exact", "within tolerance", "wrong backbone"]
# 8-bit levels. Another machine's arithmetic changes a 20-step image by much less than one level on
# average; another model, prompt or seed changes it by tens.
RMS, PEAK = 2.0, 48
_TRUST = "start it with --yes if you trust the pack"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """How far the rebuilt probes are from the stored ones, in 8-bit levels."""

    verdict: Verdict
    rms: float
    peak: int
    probes: int
    different: int  # bytes that differ

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 (N, 3, h, w) of uint8 (N, 3, H, W): exact integer means of equal tiles."""
    count, channels, height, width = images.shape
    h, w = size
    if height % h or width % w:
        raise UsageError(f"probes of {h}x{w} do not tile images of {height}x{width}")
    tiles = images.reshape(count, channels, h, height // h, w, width // w).long()
    area = (height // h) * (width // w)
    return torch.div(2 * tiles.sum((3, 5)) + area, 2 * area, rounding_mode="floor").to(torch.uint8)


def make_probes(decoder: Decoder, pairs: Sequence[Pair], size: tuple[int, int]) -> Probes:
    """Return probes of some images for an encoder to store; they must be exact."""
    if decoder.numerics.fast:
        raise UsageError("probes must be made with exact numerics")
    images = shrink(decoder.images(list(pairs)), size).cpu().numpy()
    labels, indices = np.array(pairs, dtype=np.uint32).T
    return Probes(images, labels, indices)


def check_probe_memory(pack: Pack, decoder: Decoder | None = None) -> None:
    """Refuse probes in groups of very many pixels or latent values; see `check_memory`."""
    check_memory("probes", pack, _TRUST, decoder)


def check_probe_time(pack: Pack, decoder: Decoder, *, allow_long: bool = False) -> float:
    """Return about how many seconds the probes of a pack take, by a step and pixels of one image.

    Raises:
        UsageError: it is over an hour, and the user has not allowed it (E_LONG).
    """
    if not allow_long:
        check_probe_memory(pack, decoder)
    seconds = expected_seconds(decoder, _pairs(pack))
    if not allow_long:
        check_time("the probes", seconds, _TRUST)
    return seconds


def _pairs(pack: Pack) -> list[Pair]:
    """Return class and index of the probes."""
    if pack.probes is None:
        raise UsageError("the pack has no probes", hint="only its hashes can be verified")
    return pack.probes.pairs()


def verify_probes(pack: Pack, decoder: Decoder, progress: Counter | None = None) -> ProbeReport:
    """Rebuild the probes of a pack and compare them with the stored ones.

    Args:
        pack: its probes.
        decoder: of the pack.
        progress: called with (steps of groups done, in all).
    """
    pairs, probes = _pairs(pack), pack.probes
    assert probes is not None
    stored = torch.from_numpy(np.array(probes.images))
    done, total = 0, sum(steps for _, steps in decoder.plan(pairs))

    def passed(_: float) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    with decoder.watched(passed):
        images = decoder.images(pairs)
    rebuilt = shrink(images, (stored.shape[2], stored.shape[3])).cpu()
    gap = (rebuilt.int() - stored.int()).abs()
    rms, peak = float(gap.double().square().mean().sqrt()), int(gap.max())
    verdict: Verdict = "within tolerance" if rms <= RMS and peak <= PEAK else "wrong backbone"
    return ProbeReport(
        "exact" if peak == 0 else verdict, round(rms, 4), peak, len(pairs), int((gap > 0).sum())
    )


def require_probes(pack: Pack, decoder: Decoder) -> None:
    """Raise `BackboneError` if the pack has probes and they are images of another backbone."""
    report = None if pack.probes is None else verify_probes(pack, decoder)
    if report and report.verdict == "wrong backbone":
        raise BackboneError(
            f"wrong backbone: {count(report.probes, 'probe')}, rms {report.rms},"
            f" peak {report.peak} of 255 levels",
            hint="the probes are not images of the backbone that the pack names: encode it again",
        )
