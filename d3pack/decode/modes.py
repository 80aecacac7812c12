"""Exact, or fast by named switches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from d3pack.decode.numerics import plain_cpu, plain_torch, reproducible_cuda
from d3pack.errors import UsageError

# what each gives up: bf16 three digits; channels_last and fused_attention the order of sums;
# compile the promise of equal kernels; tiny_vae the autoencoder itself
SWITCHES = ("bf16", "channels_last", "fused_attention", "compile", "tiny_vae")
_BY_DEFAULT = ("bf16", "channels_last", "fused_attention")


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the models run."""

    name: str
    dtype: torch.dtype
    switches: tuple[str, ...] = ()
    tiny_vae: Path | None = None

    @property
    def fast(self) -> bool:
        """Whether the images may differ from the exact ones."""
        return self.name == "fast"


def choose_numerics(
    name: str,
    switches: Iterable[str] | None,
    dtype: str,
    tiny_vae: str | Path | None = None,
) -> Numerics:
    """Read the mode and its switches; a switch that is not asked for is not on."""
    exact = getattr(torch, dtype)
    if name == "exact":
        if switches or tiny_vae:
            raise UsageError("exact numerics have no switches", hint='use numerics="fast"')
        return Numerics("exact", exact)
    if name != "fast":
        raise UsageError(f"unknown numerics {name!r}", hint="exact or fast")
    wanted = tuple(_BY_DEFAULT if switches is None else switches)
    if tiny_vae and "tiny_vae" not in wanted:
        wanted = (*wanted, "tiny_vae")
    for switch in wanted:
        if switch not in SWITCHES:
            raise UsageError(f"unknown switch {switch!r}", hint=f"one of {', '.join(SWITCHES)}")
    if "tiny_vae" in wanted and not tiny_vae:
        raise UsageError("tiny_vae needs an autoencoder", hint="give the directory of one")
    chosen = torch.bfloat16 if "bf16" in wanted else exact
    return Numerics("fast", chosen, tuple(sorted(wanted)), Path(tiny_vae) if tiny_vae else None)


@contextmanager
def exact_numerics(device: torch.device, numerics: Numerics) -> Iterator[None]:
    """What every exact forward runs under, whatever the program around has set.

    These are settings of the whole process: while an image is made, other threads see them, too.
    CPU: one thread for one forward. 1x1 convolutions of oneDNN sum in another order with another
    thread count, and where a thread's share of a tensor ends, sigmoid takes the scalar path.
    """
    if numerics.fast:
        yield
    elif device.type == "cuda":
        with plain_torch(), reproducible_cuda():
            yield
    else:
        with plain_torch(), plain_cpu(), _one_thread():
            yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """For this thread alone: torch counts by the thread."""
    if (before := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
