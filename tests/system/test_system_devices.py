"""The device: one default, one check."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from d3pack.errors import UsageError
from d3pack.system import fast_bfloat16, mixed_precision, resolve_device


def test_the_default_is_the_cpu_without_a_gpu() -> None:
    assert resolve_device() == resolve_device(None) == resolve_device("") == torch.device("cpu")


def test_the_default_is_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device() == torch.device("cuda:1")


def test_a_device_gets_its_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "cuda" is the current device of a thread: it is looked up once."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device(torch.device("cuda")) == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("cpu:0") == torch.device("cpu")
    with pytest.raises(UsageError, match="there is no cuda:2 on this machine; use cpu"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu9", "invalid device 'tpu9': expected cpu, cuda, cuda:1 or mps"),
        ("cuda", "there is no cuda on this machine"),
        ("meta", "there is no meta on this machine"),
        ("xpu:77", "there is no xpu:77 on this machine"),
        ("mps:77", "there is no mps:77 on this machine"),
    ],
)
def test_what_this_machine_lacks_is_refused(device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_device(device)


@pytest.mark.cuda
def test_the_default_on_a_gpu_works() -> None:
    device = resolve_device()
    assert device.type == "cuda"
    assert torch.zeros(1, device=device).device == device


def test_torch_is_imported_on_use() -> None:
    check = (
        "import sys, d3pack.system as s; s.lock, s.replace_file, s.resolve_device, s.progress_bar;"
        "s.parse_size; sys.exit(bool({'torch', 'numpy', 'rich', 'tempfile'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("instructions", "tiles", "machine", "supported"),
    [
        (True, True, "x86_64", True),
        (True, False, "x86_64", False),  # AVX512-BF16 alone is slower than float32
        (True, False, "aarch64", True),
        (False, False, "x86_64", False),
    ],
)
def test_products_are_bfloat16_where_the_processor_is_fast_at_them(
    monkeypatch: pytest.MonkeyPatch,
    instructions: bool,
    tiles: bool,
    machine: str,
    supported: bool,
) -> None:
    """Elsewhere a student takes sixteen times as long with them."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr("platform.machine", lambda: machine)
    x = torch.ones(2, 2)
    assert fast_bfloat16("cpu") is supported
    assert fast_bfloat16("cuda:0")
    with mixed_precision("cpu"):
        assert (x @ x).dtype == (torch.bfloat16 if supported else torch.float32)
    with mixed_precision("cpu", False):
        assert (x @ x).dtype == torch.float32
