"""Settings of torch that belong to the whole process, held while exact images are made.

Threads may need them at the same time: the first one in saves and sets, the last one out restores.
Until then every thread of the process runs under them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

Restore = Callable[[], Any]
Pin = Callable[[], Restore]  # sets something, and returns what sets it back


class Held:
    """Settings that stay for as long as any thread is inside `with held():`."""

    def __init__(self, pins: Sequence[Pin]) -> None:
        self._pins = pins
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()
        if hasattr(os, "register_at_fork"):  # a child does not have the threads inside
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore.close()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                with ExitStack() as restore:  # what is set before another fails is set back
                    for pin in self._pins:
                        restore.callback(pin())
                    self._restore = restore.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore.close()


def _pair(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Pin:
    def pin() -> Restore:
        before = get()
        put(value)
        return lambda: put(before)

    return pin


def _attribute(owner: Any, name: str, value: Any) -> Pin:
    return _pair(partial(getattr, owner, name), partial(setattr, owner, name), value)


def _float32(owner: Any) -> Pin:
    """Full float32 where `owner` says how precise sums are; "none" there means: as above it."""

    def pin() -> Restore:
        before = owner.fp32_precision
        if before == "ieee":
            return lambda: None
        owner.fp32_precision = "ieee"

        def restore() -> None:
            owner.fp32_precision = "none"
            if owner.fp32_precision != before:
                owner.fp32_precision = before

        return restore

    return pin


def _reduced(kind: str) -> Pin:
    """Sums of half precision in float32; how a product is split stays torch's own choice."""
    name = f"allow_{kind}_reduced_precision_reduction"

    def pin() -> Restore:
        matmul = torch.backends.cuda.matmul
        before = (getattr(matmul, name), getattr(matmul, name + "_split_k", True))
        setattr(matmul, name, False)
        # torch before 2.10 takes no pair, and splits always
        return lambda: setattr(matmul, name, before[0] if before[1] else before)

    return pin


def _cuda() -> list[Pin]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    pins = [
        _attribute(cudnn, "enabled", True),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", True),
        _reduced("fp16"),
        _reduced("bf16"),
    ]
    if hasattr(torch._C, "_get_cublas_allow_fp16_accumulation"):  # torch 2.7
        pins.append(_attribute(matmul, "allow_fp16_accumulation", False))
    if hasattr(cudnn, "conv"):
        # from the top down: what follows the setting above it need not be touched, so it can be
        # told from what was set by itself
        return [*pins, _float32(cudnn), _float32(matmul), _float32(cudnn.conv)]
    # torch before 2.9
    return [*pins, _attribute(cudnn, "allow_tf32", False), _attribute(matmul, "allow_tf32", False)]


def _cpu() -> list[Pin]:
    mkldnn: Any = torch.backends.mkldnn
    pins = [_attribute(mkldnn, "enabled", True)]
    if hasattr(mkldnn, "conv"):
        return [*pins, _float32(mkldnn.conv), _float32(mkldnn.matmul)]
    set_precision = torch.set_float32_matmul_precision
    return [*pins, _pair(torch.get_float32_matmul_precision, set_precision, "highest")]


def _anywhere() -> list[Pin]:
    sdp = torch.backends.cuda  # attention on a CPU asks these, too
    return [
        _pair(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _pair(sdp.flash_sdp_enabled, sdp.enable_flash_sdp, True),
        _pair(sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp, True),
        _pair(sdp.math_sdp_enabled, sdp.enable_math_sdp, True),
        _pair(sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp, True),
    ]


# Full float32, and no search for the fastest kernel.
reproducible_cuda = Held(_cuda())
# Full float32 by oneDNN, where torch itself takes it.
plain_cpu = Held(_cpu())
# float32 where nothing is said, and attention by the kernel that torch itself takes.
plain_torch = Held(_anywhere())
