"""Probes: small reference images in a pack, which tell whether this machine makes the same ones."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from d3pack.errors import BackboneError, UsageError
from d3pack.format import Probes
from d3pack.system import count, duration

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
# What needs a word of the user: a group of 16 images of 1024 x 1024 pixels is the largest that an
# ordinary recipe asks for, and takes about 12 GB with the small model `mini`.
MAX_PIXELS, MAX_IMAGE, LONG = 1 << 24, 1 << 21, 3600.0


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
    """Refuse groups of very many pixels, or, by an open decoder, of very many latent values.

    Nothing of their size is allocated before.

    Raises:
        UsageError: a group is too large (E_LONG).
    """
    height, width = pack.recipe.size
    group = pack.recipe.group
    image = height * width if decoder is None else int(np.prod(decoder.latent_shape))
    if image > MAX_IMAGE or group * image > MAX_PIXELS:
        what = "pixels" if decoder is None else "latent values"
        raise _long(
            f"probes in groups of {group} images of {height} x {width}, {group * image:,} {what}"
        )


def check_probe_time(pack: Pack, decoder: Decoder, *, allow_long: bool = False) -> float:
    """Return about how many seconds the probes of a pack take, by a step and pixels of one image.

    Raises:
        UsageError: it is over an hour, and the user has not allowed it (E_LONG).
    """
    groups = decoder.plan(_pairs(pack))
    if not allow_long:
        check_probe_memory(pack, decoder)
    kinds = {first[1] < pack.coded_images: first for first, _ in groups}
    timed = {coded: decoder.time_one(first) for coded, first in kinds.items()}
    seconds = []
    for first, steps in groups:
        step, pixels = timed[first[1] < pack.coded_images]
        seconds.append(decoder.group * (step * steps + pixels))
    expected = max(*seconds, sum(seconds) / decoder.parallel_groups())
    if expected > LONG and not allow_long:
        raise _long(f"the probes take about {duration(expected)} on this machine")
    return expected


def _long(message: str) -> UsageError:
    return UsageError(message, code="E_LONG", hint="start it with --yes if you trust the pack")


def _pairs(pack: Pack) -> list[Pair]:
    """Return class and index of the probes."""
    if pack.probes is None:
        raise UsageError("the pack has no probes", hint="only its hashes can be verified")
    return list(zip(pack.probes.labels.tolist(), pack.probes.indices.tolist(), strict=True))


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
    done, total, lock = 0, sum(steps for _, steps in decoder.plan(pairs)), threading.Lock()

    def passed() -> None:
        nonlocal done
        with lock:
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
