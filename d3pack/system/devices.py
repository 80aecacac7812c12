"""The device that models run on: one default and one check for all of d3pack."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d3pack.errors import UsageError
from d3pack.system.settings import SettingError, option

if TYPE_CHECKING:
    import torch


def device_option() -> Any:
    """Declare the device to work on; see `option`."""
    return option(
        None, "cpu, cuda, cuda:1, ...; without it, CUDA where there is one.", private=True
    )


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device that this machine has, by its full name: "cuda" becomes "cuda:0".

    Args:
        device: "cpu", "cuda", "cuda:1", "mps" or a `torch.device`; None or "" means CUDA where
            there is one, else the CPU.

    Raises:
        UsageError: the name is not a device, or this machine does not have it.
    """
    import torch

    if device is None or device == "":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise SettingError("device", str(device), "cpu, cuda, cuda:1 or mps") from None
    missing = UsageError(f"there is no {device} on this machine", hint="use cpu")
    if chosen.type == "cuda":
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise missing
        # without a number it is the current device of this thread; another thread may have its own
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        return torch.device("cuda", index)
    try:
        probe = torch.zeros(1, device=chosen)
        probe.cpu()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise missing from None
    return probe.device


def seconds_of(work: Callable[[], Any], *, enough: float = math.inf) -> float:
    """Return the seconds of the second call: the first one pays for allocations.

    Args:
        work: what is timed.
        enough: seconds of a first call after which there is no second.
    """
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        wait_for_device()
        if (seconds := time.perf_counter() - began) > enough:
            break
    return seconds


def wait_for_device() -> None:
    """Wait for the work of CUDA: calls return before it is done."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def fast_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device multiplies bfloat16 at least as fast as float32.

    Processors without instructions for it take ten times as long and more. Those of Intel that have
    AVX512-BF16 without AMX multiply bfloat16 at half the speed of float32 (83 against 145 GFLOP/s).
    """
    import torch

    if torch.device(device).type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    if not supported():
        return False
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return platform.machine().lower() not in ("x86_64", "amd64") or bool(has_tiles())


def mixed_precision(device: str | torch.device, wanted: bool = True) -> torch.autocast:
    """Return a context in which products are bfloat16, where that is wanted and not slower."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and fast_bfloat16(device))
