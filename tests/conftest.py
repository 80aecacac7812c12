"""A machine with a GPU runs the tests like one without, but for those marked `cuda`.

What is asked for no device takes the GPU, and would then be compared with tensors of the CPU, or
be handed to workers that cannot have it. So the GPU is hidden, from processes of our own too,
before any fixture runs; a test marked `cuda` sees it, and is skipped where there is none.

Models in tests are so small that threads slow them down: each process of pytest uses one core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch

from d3pack.encode.methods.d3m import inversion

PILOT = inversion.PILOT
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
# asking starts CUDA in this process: hiding the device from the environment comes too late to
# take it from the tests that want it
_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
_REAL = {name: getattr(torch.cuda, name) for name in ("is_available", "device_count")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this system does not have."""
    lacking = {"posix": os.name != "posix", "linux": sys.platform != "linux"}
    for item in items:
        for marker, is_lacking in lacking.items():
            if is_lacking and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {marker}"))


@pytest.fixture(scope="session", autouse=True)
def hidden_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def seen_gpu(
    request: pytest.FixtureRequest, hidden_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("cuda") is None:
        return
    if not _GPUS:
        pytest.skip("there is no GPU here")
    for name, real in _REAL.items():
        monkeypatch.setattr(torch.cuda, name, real)
    if _VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", _VISIBLE)


@pytest.fixture(scope="session", autouse=True)
def short_pilot() -> Iterator[None]:
    """Fewer gradients than `encode` takes to begin, in all tests of this process alike.

    A process that a test starts takes as many as users' do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "PILOT", 40)
        yield


@pytest.fixture
def long_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `encode` takes, for what is compared with another process."""
    monkeypatch.setattr(inversion, "PILOT", PILOT)
