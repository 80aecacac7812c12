"""The benchmark for a GPU, on small things without one: what runs there first has run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_gpu_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    from benchmarks import decode_gpu

    out = tmp_path / "out.json"
    parts = ["equality", "peak", "speed"]
    decode_gpu.main(["--device", "cpu", "--tiny", "-o", str(out), "--parts", *parts])
    found = load(out)
    assert len(found["equality"]) == 4
    for row in found["equality"].values():
        assert row["exact"], row
        assert row["images"] == row["distinct_images"] == 10
    for family in found["speed"].values():
        assert family["exact bfloat16"]["differing_bytes_reversed"] == 0
        assert family["exact float32"]["dtype"] == "float32"
        assert family["fast"]["whole"]["share_of_peak"] > 0
        assert len(family["fast"]["peak_bytes"]) == 2
