"""Train on a pack with FSDP: each rank has a share of the images and of the model.

    torchrun --nproc-per-node 2 examples/train_fsdp.py cifar10.d3m --epochs 20

The ranks decode each image once, together. A checkpoint is whole: any number of ranks goes on.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64, help="images that a rank takes in a step")
parser.add_argument("--checkpoint", type=Path, help="save here, and go on from here")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()

kind = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
mesh = init_device_mesh(kind, (dist.get_world_size(),))
first = dist.get_rank() == 0
device = torch.device(kind, dist.get_node_local_rank(0)) if kind == "cuda" else torch.device("cpu")
dataset = D3MDataset(
    args.pack, output="float", device=device, backbone=args.backbone, quiet=not first, weights=True
)
loader = dataset.loader(args.batch_size, shuffle=True, seed=0)  # knows rank and world

torch.manual_seed(0)
layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, len(dataset.classes))]
model = nn.Sequential(*layers).to(device)
fully_shard(model, mesh=mesh)  # of a deep network, each block first
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)

if args.checkpoint and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True)
    weights, state = saved["model"], saved["optimizer"]
    loaded = {"model_state_dict": weights, "optim_state_dict": state}
    set_state_dict(model, optimizer, **loaded, options=whole)
    loader.load_state_dict(json.loads(saved["loader"]))

while loader.epoch < args.epochs:
    epoch, totals = loader.epoch, torch.zeros(2, device=device)  # loss, images
    for images, labels, weight in loader:
        loss = (F.cross_entropy(model(images), labels, reduction="none") * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals += torch.tensor([loss.item() * len(labels), len(labels)], device=device)
    dist.all_reduce(totals)
    weights, state = get_state_dict(model, optimizer, options=whole)  # all ranks take part
    if first:
        print(f"epoch {epoch}: loss {totals[0] / totals[1]:.3f}, {int(totals[1])} images")
        if args.checkpoint:
            position = json.dumps(loader.state_dict())
            torch.save({"model": weights, "optimizer": state, "loader": position}, args.checkpoint)
dist.destroy_process_group()
