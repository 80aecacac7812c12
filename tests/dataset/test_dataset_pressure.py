"""Packs of very many classes, very many epochs, and readers that are killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_packs import tiny_pack
from places import ROOT

import d3pack
from d3pack import D3MDataset
from d3pack.backbones import open_backbone
from d3pack.format.codecs import encode_prompts

pytestmark = pytest.mark.slow

CLASSES = 21_841  # of all of ImageNet
EPOCHS = 20
TRAIN = """
import sys, torch
from d3pack import D3MDataset
dataset = D3MDataset(sys.argv[1], backbone=sys.argv[2], quiet=True)
torch.set_num_threads(1)
model = torch.nn.Linear(3, 100)  # the logits of all classes take more than all else
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = dataset.loader(256, shuffle=True)
for epoch in range(int(sys.argv[3])):
    loader.set_epoch(epoch)
    seen = torch.zeros(len(dataset.classes), dtype=torch.int64)
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(images.float().mean((2, 3))), labels % 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += torch.bincount(labels, minlength=len(seen))
    assert (seen == 1).all()
    status = dict(line.split(":") for line in open("/proc/self/status"))
    print(*(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssFile")), flush=True)
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_backbones import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("backbone") / "sd")


@pytest.fixture(scope="module")
def file(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = tiny_pack(backbone, classes=7, images=1, group=64)
    width = open_backbone(str(backbone)).prompt_shape[1]
    random = np.random.default_rng(0)
    pack = replace(
        small,
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        prompts=encode_prompts(random.normal(size=(CLASSES, 1, 1, width)).astype(np.float32)),
    )
    path = tmp_path_factory.mktemp("pack") / "many.d3m"
    d3pack.write(pack, path)
    return path


def test_a_training_on_all_classes_of_imagenet_has_flat_memory(
    file: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path))
    command = [sys.executable, "-c", TRAIN, str(file), str(backbone), str(EPOCHS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    sizes = [[int(size) for size in line.split()] for line in done.stdout.splitlines()]
    own, files = zip(*sizes, strict=True)  # its own memory, and pages of files, such as the store
    print([size >> 20 for size in own], [size >> 20 for size in files])
    assert len(own) == EPOCHS
    assert max(own) < 500 << 20, "most of it is torch"
    assert max(own[10:]) - max(own[:10]) < 48 << 20, own


def test_a_version_leaves_the_images_of_another_alone(
    file: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions in turn on one cache: each has its own images, decoded once."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path))
    first: torch.Tensor | None = None
    for version, new in itertools.product(("1.0.0", "1.1.0"), (True, False)):
        monkeypatch.setattr("d3pack.dataset.images.__version__", version)
        dataset = D3MDataset(file, backbone=backbone, quiet=True).select_classes(range(64))
        with dataset:
            missing = dataset.images.missing(np.arange(64), 0)
            assert len(missing) == (64 if new else 0)
            images = torch.stack([image for image, _ in dataset])
        first = images if first is None else first
        assert torch.equal(images, first)
    assert len(list((tmp_path / "images").iterdir())) >= 2


def test_killed_processes_leave_a_cache_that_others_can_use(tmp_path: Path) -> None:
    out = tmp_path / "pressure.json"
    command = [sys.executable, "-m", "benchmarks", "pressure", "--minutes", "0.3", "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    figures = json.loads(out.read_text())["figures"]
    assert (done.returncode, figures["faults"]) == (0, [])
    assert sum(figures["killed"].values()) > 3
    assert sum(figures["finished"].values()) > 3
