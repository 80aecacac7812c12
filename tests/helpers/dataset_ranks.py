"""One rank of a training that counts which images it saw; run by test_dataset_ranks.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from d3pack.dataset import D3MDataset

EPOCHS = 2


def main() -> None:
    folder, rank, world, batch, die_at = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world
    )
    dataset = D3MDataset(folder / "tiny.d3m", cache_dir=folder / "cache", quiet=True)
    number = {dataset[i][0].numpy().tobytes(): i for i in range(len(dataset))}
    loader = dataset.loader(batch, shuffle=True, seed=6)
    counts = torch.zeros(EPOCHS, len(dataset), dtype=torch.int64)
    checkpoint = folder / "checkpoint.json"
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        loader.load_state_dict(saved["loader"])
        counts = torch.tensor(saved["counts"])
    steps = 0
    while loader.epoch < EPOCHS:
        epoch = loader.epoch
        for images, labels in loader:
            seen = torch.zeros(len(dataset), dtype=torch.int64)
            for image, label in zip(images, labels.tolist(), strict=True):
                index = number[image.numpy().tobytes()]
                assert dataset.targets[index] == label
                seen[index] += 1
            steps += 1
            if steps == die_at and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(seen)
            counts[epoch] += seen
            if rank == 0:
                state = {"loader": loader.state_dict(), "counts": counts.tolist()}
                new = folder / "checkpoint.new"
                new.write_text(json.dumps(state))
                new.replace(checkpoint)
    dist.barrier()
    dist.destroy_process_group()


main()
