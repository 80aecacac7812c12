"""The training examples, run as they are, and the export to `datasets`."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from torch import Tensor

import d3pack
from d3pack.dataset import D3MDataset, list_stores
from d3pack.format import Pack, encode_weights

pytestmark = pytest.mark.heavy

EXAMPLES = ROOT / "examples"
HEAVY = 16.0  # a weight that a loss shows
TORCH_ABORTS = "terminate called without an active exception"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def file(pack: Pack, tmp_path: Path) -> Path:
    """A pack in which every image counts `HEAVY` times."""
    weights = encode_weights(np.full((3, 7), HEAVY))
    d3pack.write(replace(pack, weights=weights), tmp_path / "tiny.d3m")
    return tmp_path / "tiny.d3m"


def run(script: str, *args: object, cwd: Path, launcher: Sequence[str] = ()) -> str:
    """Return what an example prints."""
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    for state in cwd.glob("state*.pt"):  # what a second attempt starts from
        shutil.copyfile(state, state.with_suffix(".before"))
    for attempt in range(2):
        done = subprocess.run(
            [sys.executable, *launcher, str(EXAMPLES / script), *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=os.environ | env,
        )
        # at exit, a thread of gloo may outlive Python and abort: pytorch/pytorch#179291, #190489
        if attempt or not (launcher and done.returncode and TORCH_ABORTS in done.stderr):
            break
        for state in cwd.glob("state*.pt"):
            before = state.with_suffix(".before")
            before.replace(state) if before.exists() else state.unlink()
    assert done.returncode == 0, done.stderr
    return done.stdout


def complete_stores() -> list[bool]:
    """Whether each store holds all of its images."""
    entries = list_stores(Path(os.environ["D3PACK_HOME"]))
    return [entry.identity is not None and entry.decoded == 21 for entry in entries]


def test_examples_fit_on_a_screen() -> None:
    for script in EXAMPLES.glob("train_*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 70, script.name


def test_plain_pytorch_example_trains_and_resumes(
    file: Path, backbone: Path, tmp_path: Path
) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 8, "--checkpoint", tmp_path / "state.pt")
    first = run("train_plain.py", *args, "--epochs", 2, cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in first] == ["epoch 0", "epoch 1"]
    rest = run("train_plain.py", *args, "--epochs", 12, cwd=tmp_path).splitlines()
    assert rest[0].startswith("epoch 2:")
    assert counts_weights(first[0])
    assert loss_of(rest[-1]) < loss_of(first[0])


def loss_of(line: str) -> float:
    return float(line.split("loss ")[1].split()[0].rstrip(","))


def counts_weights(line: str) -> bool:
    """Return whether the loss of a first epoch is that of three classes, `HEAVY` times."""
    return loss_of(line) > HEAVY * math.log(3) / 2


def test_accelerate_example_trains(file: Path, backbone: Path, tmp_path: Path) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 8, "--epochs", 12)
    lines = run("train_accelerate.py", *args, cwd=tmp_path).splitlines()
    assert counts_weights(lines[0])
    assert loss_of(lines[-1]) < loss_of(lines[0])


@pytest.mark.e2e
@pytest.mark.parametrize(
    "script", ["train_ddp.py", pytest.param("train_fsdp.py", marks=pytest.mark.slow)]
)
def test_example_of_ranks_trains_on_two_and_resumes_on_one(
    file: Path, backbone: Path, tmp_path: Path, script: str
) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 4, "--checkpoint", tmp_path / "state.pt")
    two, one = ((*TORCHRUN, count) for count in "21")
    first = run(script, *args, "--epochs", 2, cwd=tmp_path, launcher=two).splitlines()
    assert [line.split(":")[0] for line in first] == ["epoch 0", "epoch 1"]
    rest = run(script, *args, "--epochs", 12, cwd=tmp_path, launcher=one).splitlines()
    assert rest[0].startswith("epoch 2:")
    assert all(line.endswith(", 21 images") for line in first + rest)
    assert counts_weights(first[0])
    assert loss_of(rest[-1]) < loss_of(first[0])
    assert complete_stores() == [True]


@pytest.mark.slow
@pytest.mark.e2e
def test_accelerate_example_trains_on_two_ranks(
    file: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # else it sees no ranks without a GPU
    args = (file, "--backbone", backbone, "--batch-size", 4, "--epochs", 12)
    lines = run("train_accelerate.py", *args, cwd=tmp_path, launcher=(*TORCHRUN, "2")).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {number}" for number in range(12)]
    assert counts_weights(lines[0])
    assert loss_of(lines[-1]) < loss_of(lines[0])
    assert complete_stores() == [True]


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning")
def test_lightning_example_trains_on_two_ranks(file: Path, backbone: Path, tmp_path: Path) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 4, "--epochs", 12, "--devices", 2)
    out = run("train_lightning.py", *args, cwd=tmp_path)
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {number}" for number in range(12)]
    assert counts_weights(lines[0])
    assert loss_of(lines[-1]) < loss_of(lines[0])
    assert complete_stores() == [True]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray[train]")
def test_ray_example_trains_with_two_workers(
    file: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps its results
    args = (file, "--backbone", backbone, "--batch-size", 4, "--epochs", 12, "--workers", 2)
    out = run("train_ray.py", *args, "--cache-dir", os.environ["D3PACK_HOME"], cwd=tmp_path)
    assert "epoch 0: loss " in out
    first, last = (out.split(f"epoch {number}: ")[1] for number in (0, 11))
    assert counts_weights(first)
    assert loss_of(last) < loss_of(first)
    assert complete_stores() == [True]


def test_transformers_example_trains(file: Path, backbone: Path, tmp_path: Path) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 8, "--epochs", 1, "--output", "out")
    out = run("train_transformers.py", *args, cwd=tmp_path)
    (loss,) = re.findall(r"'train_loss': '?([0-9.]+)", out)
    assert float(loss) > HEAVY * math.log(3) / 2


def test_to_hf_has_the_images_and_labels(
    pack: Pack, backbone: Path, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    dataset = D3MDataset(pack, backbone=backbone, quiet=True, soft_labels=True)
    for part, indices in ((dataset, range(21)), (dataset.select_classes([1]), range(7, 14))):
        table = part.to_hf()
        assert table.num_rows == len(part)
        assert table.features["label"].names == part.classes
        assert table["label"] == part.targets
        for row, index in zip(table, indices, strict=True):
            assert np.array_equal(np.array(row["image"]), expected[index].permute(1, 2, 0).numpy())
        assert np.allclose(table[3]["probabilities"], part[3][1].numpy())
    plain = D3MDataset(pack, backbone=backbone, quiet=True).to_hf()
    assert set(plain.features) == {"image", "label"}


class Sure:
    """A teacher that always gives one class."""

    def __init__(self, classes: Sequence[str], chosen: int) -> None:
        self.classes, self._chosen = classes, chosen

    def logits(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), len(self.classes))
        logits[:, self._chosen] = 10
        return logits


def test_to_hf_does_not_reuse_rows_of_another_dataset(
    pack: Pack, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    small = pack.first(1)
    for chosen in (0, 1):
        teacher = Sure(small.classes, chosen)
        taught = D3MDataset(small, backbone=backbone, quiet=True, teacher=teacher, cache=None)
        table = taught.to_hf()
        assert np.allclose(table[0]["probabilities"], taught[0][1].numpy())
    for numerics in ("exact", "fast"):
        dataset = D3MDataset(small, backbone=backbone, quiet=True, numerics=numerics)
        image = np.array(dataset.to_hf()[0]["image"])
        assert np.array_equal(image, dataset[0][0].permute(1, 2, 0).numpy())
