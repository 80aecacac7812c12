"""One of several processes on a cold store: notes what it decodes; run by test_dataset_cold.py.

    python dataset_cold.py FOLDER NAME HOW RANK WORLD DIE_AT

HOW: `loader`, the loader of the dataset; `items`, every image in order; `gloo`, the loader under
torch.distributed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder

DECODING = 0.03  # seconds more for each call: the backbone of the tests is faster than any other


def noted(note: Path, die_at: int) -> Any:
    """Return `Decoder.images` that notes the images it is asked for, and dies in a call."""
    decode, calls = Decoder.images, 0

    def images(self: Decoder, numbers: Sequence[int], epoch: int = 0) -> torch.Tensor:
        nonlocal calls
        calls += 1
        made = decode(self, numbers, epoch)
        time.sleep(DECODING)
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(note, "a", encoding="utf-8") as file:
            file.writelines(f"{number}\n" for number in numbers)
        return made

    return images


def main() -> None:
    folder, name, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank, world, die_at = map(int, sys.argv[4:7])
    Decoder.images = noted(folder / f"decoded-{name}", die_at)  # type: ignore[method-assign]
    if how == "gloo":
        meet = f"file://{folder}/meet-{name.partition('.')[0]}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    dataset = D3MDataset(folder / "tiny.d3m", cache_dir=folder / "cache", quiet=True)
    (folder / f"ready-{name}").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)
    if how == "items":
        for index in range(len(dataset)):
            dataset[index]
    else:
        for _ in dataset.loader(5, shuffle=True, seed=3, rank=rank, world=world):
            pass
    if how == "gloo":
        dist.barrier()
        dist.destroy_process_group()


main()
