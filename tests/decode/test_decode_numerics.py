"""Settings of the whole process: held while images are made, and left as they were."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd
from torch.nn.attention import SDPBackend, sdpa_kernel

from d3pack.decode import Decoder, Numerics, exact_numerics
from d3pack.decode.decoder import lock_of

# a child looks at flags and does nothing else
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

CUDA, CPU, EXACT = torch.device("cuda"), torch.device("cpu"), Numerics("exact", torch.float32)
BACKENDS: Any = torch.backends  # its flags are properties that types do not know
SDP = BACKENDS.cuda
CUDNN, MATMUL, MKLDNN = BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn
REDUCED = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
PRECISIONS: dict[str, Callable[[], Any]] = {
    "generic": lambda: BACKENDS.fp32_precision,
    "cuda": lambda: CUDNN.fp32_precision,
    "matmul": lambda: MATMUL.fp32_precision,
    "conv": lambda: CUDNN.conv.fp32_precision,
    "mkldnn conv": lambda: MKLDNN.conv.fp32_precision,
    "mkldnn matmul": lambda: MKLDNN.matmul.fp32_precision,
}
GETTERS: dict[str, Callable[[], Any]] = {
    **PRECISIONS,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "matmul.allow_tf32": lambda: MATMUL.allow_tf32,
    "cudnn.allow_tf32": lambda: CUDNN.allow_tf32,
    "enabled": lambda: CUDNN.enabled,
    "benchmark": lambda: CUDNN.benchmark,
    "deterministic": lambda: CUDNN.deterministic,
    "default dtype": torch.get_default_dtype,
    "flash": SDP.flash_sdp_enabled,
    "mem efficient": SDP.mem_efficient_sdp_enabled,
    "math": SDP.math_sdp_enabled,
    "cudnn sdp": SDP.cudnn_sdp_enabled,
    "mkldnn": lambda: MKLDNN.enabled,
    "fp16 accumulation": lambda: MATMUL.allow_fp16_accumulation,
    **{name: partial(getattr, MATMUL, name) for name in REDUCED},
    **{name + "_k": partial(getattr, MATMUL, name + "_split_k") for name in REDUCED},
}


def reduce(value: Any) -> None:
    for name in REDUCED:
        setattr(MATMUL, name, value)


# what a program may have set, in the old way and in the new one
AROUND: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul.allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "cudnn.allow_tf32 off": lambda: setattr(CUDNN, "allow_tf32", False),
    "generic tf32": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "generic bf16": lambda: setattr(BACKENDS, "fp32_precision", "bf16"),
    "generic ieee": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
    "cuda tf32": lambda: setattr(CUDNN, "fp32_precision", "tf32"),
    "matmul tf32": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "matmul ieee": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
    "conv tf32": lambda: setattr(CUDNN.conv, "fp32_precision", "tf32"),
    "conv ieee": lambda: setattr(CUDNN.conv, "fp32_precision", "ieee"),
    "no split k": lambda: reduce((False, False)),
    "no reduction": lambda: reduce(False),
    "cudnn off": lambda: setattr(CUDNN, "enabled", False),
    "cudnn benchmark": lambda: setattr(CUDNN, "benchmark", True),
    "bfloat16 by default": lambda: torch.set_default_dtype(torch.bfloat16),
    "no flash": lambda: SDP.enable_flash_sdp(False),
    "no mkldnn": lambda: setattr(MKLDNN, "enabled", False),
    "mkldnn conv bf16": lambda: setattr(MKLDNN.conv, "fp32_precision", "bf16"),
    "fp16 accumulation": lambda: setattr(MATMUL, "allow_fp16_accumulation", True),
}
INSIDE = {
    "default dtype": torch.float32,
    **dict.fromkeys(["flash", "mem efficient", "math", "cudnn sdp"], True),
}
INSIDE_CPU = {**INSIDE, "mkldnn": True, "mkldnn conv": "ieee", "mkldnn matmul": "ieee"}
INSIDE_CUDA = {
    **INSIDE,
    "matmul": "ieee",
    "conv": "ieee",
    "enabled": True,
    "benchmark": False,
    "deterministic": True,
    "fp16 accumulation": False,
    **dict.fromkeys(REDUCED, False),
}


def state() -> dict[str, Any]:
    found = {}
    for name, get in GETTERS.items():
        try:
            found[name] = get()
        except RuntimeError:
            found[name] = "refused"
    return found


def in_a_child(check: Callable[[], None]) -> None:
    """Some settings cannot be set back to what torch begins with, so a process of their own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.posix
@pytest.mark.parametrize("then", [None, "high", "generic ieee"])
@pytest.mark.parametrize("around", AROUND)
def test_settings_of_torch_are_restored(around: str, then: str | None) -> None:
    def check() -> None:
        AROUND[around]()
        if then:
            AROUND[then]()
        before = state()
        for device, inside in ((CUDA, INSIDE_CUDA), (CPU, INSIDE_CPU), (CUDA, INSIDE_CUDA)):
            with exact_numerics(device, EXACT):
                now = state()
                assert {name: now[name] for name in inside} == inside
            assert state() == before, (before, state())

    in_a_child(check)


@pytest.mark.posix
@pytest.mark.parametrize("later", ["ieee", "tf32"])
@pytest.mark.parametrize("around", AROUND)
def test_settings_changed_afterwards_have_the_same_effect(around: str, later: str) -> None:
    """A setting that followed a wider one follows it still."""
    found = []
    for exact in (False, True):
        read, write = os.pipe()

        def check(exact: bool = exact, write: int = write) -> None:
            AROUND[around]()
            if exact:
                with exact_numerics(CUDA, EXACT), exact_numerics(CPU, EXACT):
                    pass
            BACKENDS.fp32_precision = later
            os.write(write, repr([get() for get in PRECISIONS.values()]).encode())

        in_a_child(check)
        found.append(os.read(read, 10_000))
        os.close(read)
        os.close(write)
    assert found[0] == found[1]


@pytest.fixture
def flags() -> Iterator[None]:
    before = (CUDNN.benchmark, CUDNN.deterministic)
    CUDNN.benchmark, CUDNN.deterministic = True, False
    yield
    CUDNN.benchmark, CUDNN.deterministic = before


def test_interleaved_threads_restore_the_settings(flags: None) -> None:
    before = state()
    first, second = exact_numerics(CUDA, EXACT), exact_numerics(CUDA, EXACT)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (CUDNN.benchmark, CUDNN.deterministic) == (False, True)  # the second is still at work
    second.__exit__(None, None, None)
    assert state() == before


@pytest.mark.posix
def test_forked_child_has_the_settings_of_before(flags: None) -> None:
    def check() -> None:
        assert CUDNN.benchmark
        with exact_numerics(CUDA, EXACT):
            assert not CUDNN.benchmark
        assert CUDNN.benchmark

    with exact_numerics(CUDA, EXACT):
        in_a_child(check)


def test_threads_keep_their_own_number_of_threads() -> None:
    """torch counts threads by the thread, so there is nothing to share between two of them."""
    before = torch.get_num_threads()
    met = threading.Barrier(2, timeout=30)
    found = []

    def work(count: int) -> None:
        torch.get_num_threads()  # from here on this thread has a count of its own
        torch.set_num_threads(count)
        met.wait()
        with exact_numerics(CPU, EXACT):
            met.wait()
            found.append(torch.get_num_threads() == 1)
        met.wait()
        found.append(torch.get_num_threads() == count)

    threads = [threading.Thread(target=work, args=(count,)) for count in (2, 3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [True] * 4


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def precision(owner: Any, value: str) -> Iterator[None]:
    before, owner.fp32_precision = owner.fp32_precision, value
    try:
        yield
    finally:
        owner.fp32_precision = before


@contextmanager
def without_mkldnn() -> Iterator[None]:
    MKLDNN.enabled = False
    try:
        yield
    finally:
        MKLDNN.enabled = True


PROGRAMS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16 by default": partial(by_default, torch.bfloat16),
    "float64 by default": partial(by_default, torch.float64),
    "attention by math": partial(sdpa_kernel, SDPBackend.MATH),
    "attention by flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "no mkldnn": without_mkldnn,
    "mkldnn matmul bf16": partial(precision, MKLDNN.matmul, "bf16"),
    "mkldnn conv bf16": partial(precision, MKLDNN.conv, "bf16"),
    "everything bf16": partial(precision, BACKENDS, "bf16"),
    "another device": partial(torch.device, "meta"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_images_do_not_depend_on_the_programs_settings(
    make: Callable[[Path], Path], dtype: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "backbone")
    decoder = Decoder(tiny_pack(path, dtype=dtype, steps=2), path=path)
    wanted = decoder.images(range(4))
    for name, around in PROGRAMS.items():
        with around():
            found = decoder.images(range(4))
        assert int((found != wanted).sum()) == 0, name


@pytest.mark.posix
def test_forked_child_does_not_wait_for_its_parents_locks() -> None:
    backbone: Any = object()
    lock = lock_of(backbone)
    assert lock_of(backbone) is lock

    def check() -> None:
        assert not lock_of(backbone).locked()

    with lock:
        in_a_child(check)
