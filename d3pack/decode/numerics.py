"""Exact or fast numerics, and the settings of torch under which exact images are made.

The settings belong to the whole process, and several threads may need them at once: the first one
in saves and sets them, the last one out restores them. Until then every thread of the process runs
under them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d3pack.errors import UsageError

# what each gives up: bf16 three digits; channels_last and fused_attention the order of sums;
# compile the promise of equal kernels; tiny_vae the autoencoder itself
SWITCHES = ("bf16", "channels_last", "fused_attention", "compile", "tiny_vae")
DEFAULT_SWITCHES = ("bf16", "channels_last", "fused_attention")

Restore = Callable[[], Any]
Setting = Callable[[], Restore]  # sets something, and returns what restores it


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the models compute."""

    name: str  # "exact" or "fast"
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
    """Return numerics by name.

    Args:
        name: "exact" or "fast".
        switches: of "fast", from `SWITCHES`; None for `DEFAULT_SWITCHES`.
        dtype: of the recipe.
        tiny_vae: directory of a small autoencoder, for the switch of that name.
    """
    exact = getattr(torch, dtype)
    if name == "exact":
        if switches or tiny_vae:
            raise UsageError("exact numerics have no switches", hint='use numerics="fast"')
        return Numerics("exact", exact)
    if name != "fast":
        raise UsageError(f"unknown numerics {name!r}: expected 'exact' or 'fast'")
    chosen = set(DEFAULT_SWITCHES if switches is None else switches)
    if tiny_vae:
        chosen.add("tiny_vae")
    for switch in sorted(chosen):
        if switch not in SWITCHES:
            known = ", ".join(map(repr, SWITCHES))
            raise UsageError(f"unknown switch {switch!r}: expected one of {known}")
    if "tiny_vae" in chosen and not tiny_vae:
        raise UsageError(
            "the switch 'tiny_vae' needs an autoencoder", hint="give its directory as tiny_vae="
        )
    computed = torch.bfloat16 if "bf16" in chosen else exact
    return Numerics("fast", computed, tuple(sorted(chosen)), Path(tiny_vae) if tiny_vae else None)


@contextmanager
def exact_numerics(device: torch.device, numerics: Numerics) -> Iterator[None]:
    """Set what every exact forward pass needs, whatever the program has set.

    On a CPU a forward pass has one thread: 1x1 convolutions of oneDNN sum in another order with
    another number of threads, and at the end of a thread's share of a tensor, sigmoid is computed
    by other instructions.
    """
    if numerics.fast:
        yield
    elif device.type == "cuda":
        with _default_torch(), reproducible_cuda():
            yield
    else:
        with _default_torch(), _float32_cpu(), _one_thread():
            yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread in this thread; it counts them for each thread."""
    if (before := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SharedSettings:
    """Settings that hold while any thread is inside `with settings():`."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()
        if hasattr(os, "register_at_fork"):  # a child does not have the threads inside
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore.close()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                with ExitStack() as restore:  # restores earlier settings if a later one fails
                    for setting in self._settings:
                        restore.callback(setting())
                    self._restore = restore.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore.close()


def _pair(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Setting:
    def setting() -> Restore:
        before = get()
        put(value)
        return lambda: put(before)

    return setting


def _attribute(owner: Any, name: str, value: Any) -> Setting:
    return _pair(partial(getattr, owner, name), partial(setattr, owner, name), value)


def _full_float32(owner: Any) -> Setting:
    """Full float32 where `owner` sets the precision; "none" means that of the setting above it."""

    def setting() -> Restore:
        before = owner.fp32_precision
        if before == "ieee":
            return lambda: None
        owner.fp32_precision = "ieee"

        def restore() -> None:
            owner.fp32_precision = "none"
            if owner.fp32_precision != before:
                owner.fp32_precision = before

        return restore

    return setting


def _float32_sums(kind: str) -> Setting:
    """Sums of half precision in float32; how a product is split stays torch's own choice."""
    name = f"allow_{kind}_reduced_precision_reduction"

    def setting() -> Restore:
        matmul = torch.backends.cuda.matmul
        before = (getattr(matmul, name), getattr(matmul, name + "_split_k", True))
        setattr(matmul, name, False)
        # torch before 2.10 takes no pair, and splits always
        return lambda: setattr(matmul, name, before[0] if before[1] else before)

    return setting


def _cuda_settings() -> list[Setting]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = [
        _attribute(cudnn, "enabled", True),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", True),
        _float32_sums("fp16"),
        _float32_sums("bf16"),
    ]
    if hasattr(torch._C, "_get_cublas_allow_fp16_accumulation"):  # torch 2.7
        settings.append(_attribute(matmul, "allow_fp16_accumulation", False))
    if hasattr(cudnn, "conv"):
        # from the top down: a setting that follows the one above it is then already right, and so
        # can be told from one that was set itself
        return [*settings, *map(_full_float32, (cudnn, matmul, cudnn.conv))]
    # torch before 2.9
    return [*settings, *(_attribute(owner, "allow_tf32", False) for owner in (cudnn, matmul))]


def _cpu_settings() -> list[Setting]:
    mkldnn: Any = torch.backends.mkldnn
    settings = [_attribute(mkldnn, "enabled", True)]
    if hasattr(mkldnn, "conv"):
        return [*settings, _full_float32(mkldnn.conv), _full_float32(mkldnn.matmul)]
    set_precision = torch.set_float32_matmul_precision
    return [*settings, _pair(torch.get_float32_matmul_precision, set_precision, "highest")]


def _default_settings() -> list[Setting]:
    sdp = torch.backends.cuda  # attention on a CPU reads these, too
    return [
        _pair(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _pair(sdp.flash_sdp_enabled, sdp.enable_flash_sdp, True),
        _pair(sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp, True),
        _pair(sdp.math_sdp_enabled, sdp.enable_math_sdp, True),
        _pair(sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp, True),
    ]


# full float32 and deterministic kernels, without a search for the fastest
reproducible_cuda = SharedSettings(_cuda_settings())
# full float32 by oneDNN
_float32_cpu = SharedSettings(_cpu_settings())
# float32 as the default dtype, and torch's own choice of attention kernels
_default_torch = SharedSettings(_default_settings())
