"""Train on a pack with accelerate, on one device or many.

    accelerate launch examples/train_accelerate.py cifar10.d3m --epochs 20

The only line that knows of packs is the one that opens the dataset.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
dataset = D3MDataset(
    args.pack,
    output="float",
    device=accelerator.device,
    backbone=args.backbone,
    quiet=not accelerator.is_main_process,
    weights=True,
)

layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
layers += [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU()]
model = nn.Sequential(
    *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(dataset.classes))
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(args.epochs):
    totals = torch.zeros(3, device=accelerator.device)  # loss, hits, images
    for images, labels, weights in loader:
        logits = model(images)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        hits = int((logits.argmax(1) == labels).sum())
        count = len(labels)
        totals += torch.tensor([loss.item() * count, hits, count], device=accelerator.device)
    loss_sum, hits, count = accelerator.reduce(totals).tolist()
    accelerator.print(f"epoch {epoch}: loss {loss_sum / count:.3f}, accuracy {hits / count:.1%}")
accelerator.end_training()
