"""Every target of the fuzzer for a moment; the nightly workflow gives them many more inputs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_mutate import mutate_bytes, mutate_json
from fuzz_targets import TARGETS

from d3pack.errors import D3MError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_raise_d3m_errors_alone(
    target: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = TARGETS[target](tmp_path)
    refused = 0
    for number in range(60):
        try:
            run(random.Random(f"{target} {number}"))
        except D3MError:
            refused += 1
    assert refused > 10


def test_mutations_follow_from_their_seed() -> None:
    value = {"a": [1, 2, {"b": None}], "c": "text"}
    for number in range(50):
        one, two = (mutate_json(value, random.Random(number)) for _ in range(2))
        assert repr(one) == repr(two)
        data, again = (mutate_bytes(b"0123456789", [b"x"], random.Random(number)) for _ in range(2))
        assert data == again
    assert value == {"a": [1, 2, {"b": None}], "c": "text"}


@pytest.mark.e2e
def test_command_counts_what_came_out() -> None:
    words = [sys.executable, "tests/fuzz", "embeddings", "-n", "50"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["inputs"], found["faults"]) == (50, [])
    assert sum(found["codes"].values()) == 50


def test_nightly_workflow_runs_every_target() -> None:
    text = (ROOT / ".github/workflows/fuzz.yml").read_text()
    assert f"target: [{', '.join(TARGETS)}]" in text
