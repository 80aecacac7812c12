"""Train a small network on a pack with plain PyTorch.

    python examples/train_plain.py cifar10.d3m --epochs 20

The loader decodes ahead while the first epoch trains; later epochs read what it kept.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--checkpoint", type=Path, help="save here, and go on from here")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()


def augment(images: torch.Tensor) -> torch.Tensor:
    """Whole batches, on the device: mirrored at random."""
    return torch.where(
        torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images, images.flip(3)
    )


torch.manual_seed(0)
options = {"output": "float", "batch_transform": augment, "backbone": args.backbone}
dataset = D3MDataset(args.pack, weights=True, **options)
loader = dataset.loader(args.batch_size, shuffle=True, seed=0)

layers = [nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.AvgPool2d(2)]
for _ in range(2):
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.AvgPool2d(2)]
model = nn.Sequential(
    *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(dataset.classes))
)
model.to(dataset.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

if args.checkpoint and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(json.loads(saved["loader"]))

while loader.epoch < args.epochs:
    epoch, total, right, seen = loader.epoch, 0.0, 0, 0
    for images, labels, weights in loader:
        logits = model(images)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    print(f"epoch {epoch}: loss {total / seen:.3f}, accuracy {right / seen:.1%}")
    if args.checkpoint:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "loader": json.dumps(loader.state_dict())}, args.checkpoint)
