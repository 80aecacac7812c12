"""Train on a pack with Ray Train, on one machine or a cluster.

    python examples/train_ray.py cifar10.d3m --epochs 20 --workers 2

Workers on one machine decode each image once, together; with `--cache-dir` in a folder that all
machines see, all of them do. Paths are absolute: workers run in folders of their own.
"""

import argparse
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn
from torch.nn import functional as F

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--workers", type=int, default=1)
parser.add_argument("--cache-dir", type=Path, help="folder of the decoded images")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")


def train(config: dict[str, Any]) -> None:
    """What every worker does."""
    first = ray.train.get_context().get_world_rank() == 0
    dataset = D3MDataset(
        config["pack"],
        output="float",
        device=get_device(),
        backbone=config["backbone"],
        cache_dir=config["cache_dir"],
        quiet=not first,
        weights=True,
    )
    loader = dataset.loader(config["batch_size"], shuffle=True, seed=0)  # knows rank and world
    layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
    classes = len(dataset.class_to_idx)  # Ray pickles this function, and takes .classes for torch's
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, classes)]
    model = prepare_model(nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(config["epochs"]):
        for images, labels, weights in loader:
            loss = (F.cross_entropy(model(images), labels, reduction="none") * weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ray.train.report({"epoch": epoch, "loss": loss.item()})
        if first:
            print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    config = vars(parser.parse_args())
    scaling = ScalingConfig(num_workers=config["workers"], use_gpu=gpu)
    TorchTrainer(train, train_loop_config=config, scaling_config=scaling).fit()
