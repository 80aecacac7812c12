"""Train on a pack with DistributedDataParallel, and go on after a kill with any number of ranks.

    torchrun --nproc-per-node 2 examples/train_ddp.py cifar10.d3m --epochs 20

The ranks decode each image once, together.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64, help="images that a rank takes in a step")
parser.add_argument("--checkpoint", type=Path, help="save here, and go on from here")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
first = dist.get_rank() == 0
device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
dataset = D3MDataset(
    args.pack, output="float", device=device, backbone=args.backbone, quiet=not first, weights=True
)
loader = dataset.loader(args.batch_size, shuffle=True, seed=0)  # knows rank and world

torch.manual_seed(0)
layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, len(dataset.classes))]
model = DistributedDataParallel(nn.Sequential(*layers).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

if args.checkpoint and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True, map_location=device)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(json.loads(saved["loader"]))

while loader.epoch < args.epochs:
    epoch, totals = loader.epoch, torch.zeros(2, device=device)  # loss, images
    for images, labels, weights in loader:
        loss = (F.cross_entropy(model(images), labels, reduction="none") * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals += torch.tensor([loss.item() * len(labels), len(labels)], device=device)
    dist.all_reduce(totals)
    if first:
        print(f"epoch {epoch}: loss {totals[0] / totals[1]:.3f}, {int(totals[1])} images")
        if args.checkpoint:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "loader": json.dumps(loader.state_dict())}, args.checkpoint)
dist.destroy_process_group()
