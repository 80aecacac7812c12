"""The training examples, run as they are, and the export to `datasets`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from torch import Tensor

import d3pack
from d3pack.dataset import D3MDataset
from d3pack.format import Pack

pytestmark = pytest.mark.heavy

EXAMPLES = ROOT / "examples"


@pytest.fixture
def file(pack: Pack, tmp_path: Path) -> Path:
    d3pack.write(pack, tmp_path / "tiny.d3m")
    return tmp_path / "tiny.d3m"


def run(script: str, *args: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert loss_of(rest[-1]) < loss_of(first[0])


def loss_of(line: str) -> float:
    return float(line.split("loss ")[1].split(",")[0])


def test_accelerate_example_trains(file: Path, backbone: Path, tmp_path: Path) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 8, "--epochs", 12)
    lines = run("train_accelerate.py", *args, cwd=tmp_path).splitlines()
    assert loss_of(lines[-1]) < loss_of(lines[0])


def test_transformers_example_trains(file: Path, backbone: Path, tmp_path: Path) -> None:
    args = (file, "--backbone", backbone, "--batch-size", 8, "--epochs", 4, "--output", "out")
    assert "train_loss" in run("train_transformers.py", *args, cwd=tmp_path)


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
